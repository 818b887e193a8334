"""A product with low-rank adapters beside it, by the strategy that moves least.

T tokens, S in, R out, P rank.   Y [T, R] = X W^T + H U^T,   H [T, P] = scale X D^T

    forward   W = W^R,          D = L^T [P, K],   U = R^T [N, P]
    dgrad     W = (W^{R,C})^T,  D = R [P, N],     U = L [K, P]

The products over P are small; what costs is that X and Y move once more for each. The strategies:

    last               Y := X W^T, then Y += H U^T in place: X is read again, Y read and written again
    first              Y := H U^T, then Y += X W^T in the sparse product's epilogue
    column-augmented   one sparse product of an operand that has U in it (`operands.augmented`)

All but "last" are for PackedOperands. On a GPU those that there are are timed once for each shape behind a numerics
gate, and the choice is kept like every other.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from slope_megatron.ops.autotune import timing
from slope_megatron.ops.autotune.resolve import refuse_while_capturing, resolve, uncompiled
from slope_megatron.ops.choices import AdapterChoice, Key, Product, Strategy
from slope_megatron.ops.operands.bias import WithBias
from slope_megatron.ops.operands.packed import PackedOperands

logger = logging.getLogger(__name__)
# Each strategy rounds one term, or H, to 16 bits before the sum: within 2^-9 of what is no larger than a few times Y.
MOST_RELATIVE_ERROR = 1e-2


def product(operands, product: Product, x_TS, down_PS, up_RP, scale: float, x_of_weight=None):
    """Y = X W^T + H U^T, `[T, R]`, and H = scale X D^T, `[T, P]`, which the adapters' gradients read.

    Args:
        operands: whose W it is; `product` FORWARD or DGRAD says which one.
        x_of_weight: what W is multiplied with where that is not X itself (a pruned gradient).
    """
    strategy = _strategy(operands, product, x_TS, up_RP) if x_of_weight is None else Strategy.LAST
    if strategy is Strategy.AUGMENTED:
        bias_R = operands.bias_of(product) if isinstance(operands, WithBias) else None
        return _packed(operands).augmented(product).with_adapters(x_TS, down_PS, up_RP, scale, bias_R)
    hidden_TP = hidden(x_TS, down_PS, scale)
    if strategy is Strategy.FIRST:
        return _first(operands, product, x_TS, hidden_TP, up_RP), hidden_TP
    return _last(operands, product, x_TS if x_of_weight is None else x_of_weight, hidden_TP, up_RP), hidden_TP


def hidden(x_TS: torch.Tensor, down_PS: torch.Tensor, scale: float) -> torch.Tensor:
    """H = scale X D^T, the scale applied to the fp32 sums."""
    hidden_TP = x_TS.new_empty(x_TS.shape[0], down_PS.shape[0])
    # With beta 0 nothing is read of what the new tensor holds.
    return hidden_TP.addmm_(x_TS, down_PS.t(), beta=0, alpha=scale)


def _packed(operands) -> Any:
    """The PackedOperands, behind a bias or not; None: others, which have no choice."""
    inner = operands.inner if isinstance(operands, WithBias) else operands
    return inner if isinstance(inner, PackedOperands) else None


def _last(operands, product: Product, x_TS, hidden_TP, up_RP) -> torch.Tensor:
    y_TR = operands.forward(x_TS) if product is Product.FORWARD else operands.dgrad(x_TS)
    return y_TR.addmm_(hidden_TP, up_RP.t())


def _first(operands, product: Product, x_TS, hidden_TP, up_RP) -> torch.Tensor:
    return operands.add(product, x_TS, hidden_TP @ up_RP.t())


def _strategy(operands, product: Product, x_TS: torch.Tensor, up_RP: torch.Tensor) -> Strategy:
    """One of the module's strategies; measured the first time on a GPU."""
    packed = _packed(operands)
    if packed is None:
        return Strategy.LAST
    rows, rank = up_RP.shape
    present = packed.augmented(product)
    if present is not None:
        return Strategy.AUGMENTED if present.rank == rank else Strategy.LAST
    key = Key(product, rows, x_TS.shape[1], x_TS.shape[0], x_TS.dtype, rank)
    device = x_TS.device
    measured = functools.partial(measure, packed, key, device)
    strategy = resolve(key, device, measured, on_cpu=AdapterChoice(Strategy.FIRST)).strategy
    return strategy if strategy is not Strategy.AUGMENTED else uncompiled(_augment)(packed, key)


def _augment(operands: PackedOperands, key: Key) -> Strategy:
    """Give a product the operand with room for adapters, where these operands can have it."""
    if not operands.can_augment(key.product, key.tokens, key.rank):
        return Strategy.LAST
    refuse_while_capturing(key, operands.patterns.device)
    operands.augment(key.product, key.rank)
    return Strategy.AUGMENTED


@torch.no_grad()
def measure(operands: PackedOperands, key: Key, device: torch.device, *, rounds: int = 7) -> AdapterChoice:
    """Time the strategies that these operands offer, on random data. Synchronizes."""
    product, rank = key.product, key.rank

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=key.dtype)

    x_TS, down_PS, up_RP = random(key.tokens, key.columns), random(rank, key.columns), random(key.rows, rank)
    # Terms of the size of Y's own, the hardest case for the rounding of the one that comes first.
    scale = float(operands.product(product, x_TS)[:64].float().std()) / (rank * key.columns) ** 0.5
    strategies: dict[Strategy, Callable[[], torch.Tensor]] = {
        Strategy.LAST: lambda: _last(operands, product, x_TS, hidden(x_TS, down_PS, scale), up_RP),
        Strategy.FIRST: lambda: _first(operands, product, x_TS, hidden(x_TS, down_PS, scale), up_RP),
    }
    if operands.can_augment(product, key.tokens, rank):
        copy = operands.augmented_copy(product, rank)
        strategies[Strategy.AUGMENTED] = lambda: copy.with_adapters(x_TS, down_PS, up_RP, scale)[0]
    expected = strategies[Strategy.LAST]().float()
    for name in [name for name in strategies if name is not Strategy.LAST]:
        problem = wrong(strategies[name], expected)
        if problem:
            logger.warning("%s: strategy %s is not used: %s", key, name, problem)
            del strategies[name]
    del expected
    rough = timing.median(timing.interleaved({"": strategies[Strategy.LAST]}, rounds=3, calls=1)[""])
    samples = timing.interleaved(strategies, rounds=rounds, calls=timing.calls_for(rough))
    times = {name: timing.median(values) for name, values in samples.items()}
    torch.cuda.empty_cache()
    return AdapterChoice(min(times, key=times.__getitem__), {name.value: ms for name, ms in times.items()})


def wrong(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> str | None:
    """The numerics gate: all strategies compute the same but for a rounding to 16 bits. One that cannot run is none."""
    try:
        found = run()
    except torch.AcceleratorError:
        # The context is lost: nothing can run after this.
        raise
    except Exception as error:  # libraries and compilers have types of their own
        return f"it cannot run ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    difference = float((found.float() - expected).norm() / expected.norm())
    return None if difference <= MOST_RELATIVE_ERROR else f"wrong results, relative difference {difference:.1e}"
