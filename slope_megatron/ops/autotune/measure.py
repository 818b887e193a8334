"""Measuring the candidates for one product: the dense one, and each library's, behind the numerics gate.

T tokens, R rows and S columns of the operand.
"""

from collections.abc import Callable

import torch

from slope_megatron.config.slope import LIBRARIES
from slope_megatron.ops import choices, hints, libraries
from slope_megatron.ops.autotune import measure_weight, timing
from slope_megatron.ops.autotune.trials import Candidate, Trial
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.sparsity.float8 import E4M3

# A sparse product must be this much faster, or the dense one stays.
WORTH_IT = 0.99


def prepare(key: Key, device: torch.device) -> Trial:
    """Fresh random data."""
    if key.product is Product.WGRAD:
        # It compiles kernels that no machine without `full` mode needs.
        from slope_megatron.ops.autotune.measure_wgrad import WgradTrial

        return WgradTrial(key, device)
    if key.dtype == E4M3:
        from slope_megatron.ops.autotune.measure_float8 import Float8Trial

        return Float8Trial(key, device)
    return measure_weight.trial_of(key, device)


def libraries_for(key: Key) -> tuple[str, ...]:
    """Whose candidates are tried: a weight that has been measured for other tokens keeps its library, as its tiles."""
    earlier = choices.earlier(key) if key.product is not Product.WGRAD else None
    if earlier is None:
        return LIBRARIES
    return (earlier.library or LIBRARIES[0],)


def contest(
    key: Key,
    device: torch.device,
    *,
    rounds: int = 9,
    among: tuple[str, ...] = (),
    beside: Callable[[Trial], dict[str, Callable]] | None = None,
) -> dict:
    """Times (ms, one a round) of the dense product, "dense", and of each sparse finalist, (tiles, algorithm).

    Synchronizes; takes about a second for a large product, less where an earlier run on this machine has chosen: then
    its choice alone is a finalist, if it passes the gate.

    Args:
        among: the libraries whose candidates are tried; none: those that the shape's operands allow.
        beside: what else of the trial is timed in turn with them, by name.
    """
    trial = prepare(key, device)
    candidates = finalists(trial, among or libraries_for(key))
    functions: dict = {"dense": trial.dense_product}
    functions |= beside(trial) if beside else {}
    functions |= {(candidate.tiles, candidate.algorithm): candidate for candidate in candidates}
    rough = timing.median(timing.interleaved({"": trial.dense_product}, rounds=3, calls=1)[""])
    return timing.interleaved(functions, rounds=rounds, calls=timing.calls_for(rough))


def finalists(trial: Trial, among: tuple[str, ...]) -> list[Candidate]:
    """The fastest sparse candidates of these libraries, behind the gate."""
    hint, candidates = hints.find(trial.key), list[Candidate]()
    if hint is not None and hint.library in among:
        candidates = libraries.load()[hint.library].finalists(trial, hint)
    for name in () if candidates else among:
        candidates += libraries.load()[name].finalists(trial)
    return candidates


def pick(key: Key, samples: dict, *, dense_allowed: bool = True) -> Choice:
    """The choice that a contest's times call for."""
    times = {name: timing.median(values) for name, values in samples.items()}
    dense_ms = times.pop("dense")
    best = min(times, key=times.__getitem__, default=None)
    if best is None and not dense_allowed:
        raise ValueError(f"no 2:4 algorithm gives right results for {key}; use --slope-backend auto")
    if best is None or (dense_allowed and times[best] > WORTH_IT * dense_ms):
        return Choice(False, sparse_ms=times.get(best), dense_ms=dense_ms)
    return Choice(True, best[0], best[1], times[best], dense_ms)


@torch.no_grad()
def measure(key: Key, device: torch.device, *, dense_allowed: bool = True, among: tuple[str, ...] = ()) -> Choice:
    """Measure a product's candidates, those of the libraries `among` or of all, and choose."""
    choice = pick(key, contest(key, device, among=among), dense_allowed=dense_allowed)
    if dense_allowed and (not among or key.product is Product.WGRAD):
        # Of a contest that some were kept from, the winner says nothing to others.
        hints.note(key, choice)
    # The trial's tensors are large and of sizes that training will not ask for again.
    torch.cuda.empty_cache()
    return choice
