"""Measuring the candidates for one product, behind a numerics gate.

T tokens, R rows and S columns of the operand. Candidates: the dense product, the sparse one with cuSPARSELt's
algorithms, whole or cut into halves or squares, and with our own kernels (`measure_cutlass`). Some algorithms of
cuSPARSELt have returned wrong results (pytorch#155333), so each is compared with the dense product on random data,
several times on poisoned outputs, before its time counts.
"""

import logging
from collections.abc import Callable, Iterable

import torch

from slope_kernels import cusparselt
from slope_megatron.ops import choices
from slope_megatron.ops.autotune import measure_cutlass, measure_weight, timing
from slope_megatron.ops.autotune.trials import ROWS_AT_ONCE, Candidate, OwnTrial, PlannedCandidate, Trial
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.ops.custom_ops import layout
from slope_megatron.sparsity.float8 import E4M3

logger = logging.getLogger(__name__)
# Both products round the same fp32 sums, which differ in their order alone, to 16 bits: measured errors are near 3e-4.
MOST_RELATIVE_ERROR = 2e-3
# No single element may be off by more than a few roundings of itself plus a share of the typical element.
MOST_ELEMENT_ERROR = 2e-2
# Sums of e4m3 products err by 1.5e-3 over 9216 terms, on 2:4 and on dense tensor cores alike.
MOST_ERRORS_E4M3 = (8e-3, 5e-2)
GATE_REPEATS = 3
# A sparse product must be this much faster, or the dense one stays.
WORTH_IT = 0.99
FINALISTS = 3
# An operand in tiles is tried with the algorithms that were best for the whole one.
TRIED_IN_TILES = 6
# The first algorithms, all that bf16 has on sm_90 (cuSPARSELt 0.8.0). fp16 has 52, of which some past 32 do not merely
# give wrong results: they end the process's CUDA context with an illegal instruction.
MOST_CONFIGS = 21
LIBRARIES = ("cusparselt", "cutlass")


def prepare(key: Key, device: torch.device) -> Trial:
    """Fresh random data."""
    if key.kind == "wgrad":
        # It compiles kernels that no machine without `full` mode needs.
        from slope_megatron.ops.autotune.measure_wgrad import WgradTrial

        return WgradTrial(key, device)
    if key.dtype == E4M3:
        from slope_megatron.ops.autotune.measure_float8 import Float8Trial

        return Float8Trial(key, device)
    return measure_weight.trial_of(key, device)


def wrong(candidate: Candidate) -> str | None:
    """The numerics gate: what is wrong with a candidate's results; None: nothing."""
    trial = candidate.trial
    bounds = MOST_ERRORS_E4M3 if trial.key.dtype == E4M3 else (MOST_RELATIVE_ERROR, MOST_ELEMENT_ERROR)
    for _ in range(GATE_REPEATS):
        trial.poison()
        candidate()
        found, expected = trial.y_TR, trial.expected_TR
        typical = float(expected.norm(dtype=torch.float32)) / expected.numel() ** 0.5
        squares, worst = 0.0, 0.0
        for part, part_expected in zip(found.split(ROWS_AT_ONCE), expected.split(ROWS_AT_ONCE), strict=True):
            difference = (part.float() - part_expected.float()).abs()
            squares += float(difference.square().sum())
            worst = max(worst, float((difference / (part_expected.float().abs() + typical)).nan_to_num(1e9).max()))
        relative = squares**0.5 / (typical * expected.numel() ** 0.5)
        most_relative, most_element = bounds
        if not (relative <= most_relative and worst <= most_element):
            return f"relative error {relative:.1e}, worst element {worst:.1e}"
    return None


def ranking(trial: Trial, tiles: int, configs: Iterable[int]) -> list[int]:
    """The library's algorithms from the fastest on, by a rough timing; those that cannot run are left out.

    They are tried by number, not by the library's own search, which tries all: see MOST_CONFIGS.
    """
    timed = []
    for config in configs:
        algorithm = cusparselt.Algorithm(config)
        try:
            candidate = trial.candidate(algorithm, tiles)
            times = timing.interleaved({"": candidate}, rounds=2, calls=2)[""]
        except torch.AcceleratorError:
            # The context is lost: nothing can run after this.
            raise
        except RuntimeError as error:
            logger.debug("%s: algorithm %d cannot run: %s", trial.key, config, error)
            continue
        timed.append((min(times), config))
        candidate.plan.close()
    return [config for _, config in sorted(timed)]


def finalists(trial: Trial, tiles: int, ranked: list[int]) -> list[PlannedCandidate]:
    """The first few, as far as they pass the gate."""
    passed = []
    for config in ranked[:FINALISTS]:
        candidate = trial.candidate(cusparselt.Algorithm(config), tiles)
        problem = wrong(candidate)
        if problem:
            logger.warning("%s: algorithm %d gives wrong results and is not used: %s", trial.key, config, problem)
        else:
            passed.append(candidate)
    return passed


def tilings(key: Key, device: torch.device) -> list[int]:
    """Whole; where the operand is taller than wide, also in halves, and in squares where it is a whole number high.

    A shape that has been measured for other tokens keeps its tiles: a weight has one operand. wgrad's lives for one
    product and stays whole; so do operands in e4m3.
    """
    if key.kind == "wgrad" or key.dtype == E4M3:
        return [1]
    fixed = choices.fixed_tiles(key)
    if fixed:
        return [fixed]
    height = key.rows // key.columns
    if height < 2 or not layout.probe(device, key.dtype).known_metadata:
        return [1]
    cuts = {2, height} if key.rows % key.columns == 0 else {2}
    return [1, *sorted(tiles for tiles in cuts if key.rows % (64 * tiles) == 0)]


def libraries_for(key: Key) -> tuple[str, ...]:
    """Whose candidates are tried: a weight that has been measured for other tokens keeps its library, as its tiles."""
    earlier = choices.earlier(key) if key.kind != "wgrad" else None
    return LIBRARIES if earlier is None else (("cutlass",) if earlier.by_cutlass else ("cusparselt",))


def cusparselt_finalists(trial: Trial, tilings: list[int]) -> list[PlannedCandidate]:
    """Of every number of tiles; an operand in tiles meets those algorithms that were best for the whole one."""
    configs: Iterable[int] = range(min(MOST_CONFIGS, trial.candidate(None, 1).plan.algorithm_count()))
    found = []
    for tiles in tilings:
        ranked = ranking(trial, tiles, configs)
        configs = ranked[:TRIED_IN_TILES]
        found += finalists(trial, tiles, ranked)
    return found


def contest(
    key: Key,
    device: torch.device,
    *,
    rounds: int = 9,
    libraries: tuple[str, ...] = (),
    beside: Callable[[Trial], dict[str, Callable]] | None = None,
) -> dict:
    """Times (ms, one a round) of the dense product, "dense", and of each sparse finalist, (tiles, algorithm).

    Synchronizes; takes about a second for a large product.

    Args:
        libraries: whose candidates; none: those that the shape's operands allow.
        beside: what else of the trial is timed in turn with them, by name.
    """
    libraries = libraries or libraries_for(key)
    trial = prepare(key, device)
    functions: dict = {"dense": trial.dense_product}
    candidates: list[Candidate] = []
    if "cusparselt" in libraries:
        candidates += cusparselt_finalists(trial, tilings(key, device))
    if "cutlass" in libraries and isinstance(trial, OwnTrial):
        candidates += measure_cutlass.finalists(trial, wrong)
    functions |= beside(trial) if beside else {}
    functions |= {(candidate.tiles, candidate.algorithm): candidate for candidate in candidates}
    rough = timing.median(timing.interleaved({"": trial.dense_product}, rounds=3, calls=1)[""])
    return timing.interleaved(functions, rounds=rounds, calls=timing.calls_for(rough))


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


def measure(key: Key, device: torch.device, *, dense_allowed: bool = True, libraries: tuple[str, ...] = ()) -> Choice:
    """Measure a product's candidates, those of `libraries` or of all, and choose."""
    choice = pick(key, contest(key, device, libraries=libraries), dense_allowed=dense_allowed)
    # The trial's tensors are large and of sizes that training will not ask for again.
    torch.cuda.empty_cache()
    return choice
