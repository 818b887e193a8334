"""A product with low-rank adapters beside it, in the way that moves least.

T tokens, S in, R out, P rank.   Y [T, R] = X W^T + H U^T,   H [T, P] = scale X D^T

    forward   W = W^R,          D = L^T [P, K],   U = R^T [N, P]
    dgrad     W = (W^{R,C})^T,  D = R [P, N],     U = L [K, P]

The products over P are small; what costs is that X and Y move once more for each. The ways:

    last          Y := X W^T, then Y += H U^T in place: X is read again, Y read and written again
    kernels       the same by kernels of our own, for small ranks
    first         Y := H U^T, then Y += X W^T in the sparse product's epilogue
    tall, wide    one sparse product of an operand that has D or U in it (`operands.augmented`)

"first" is for operands with `forward_add` or `dgrad_add` (X, Y -> Y + X W^T, which may overwrite Y). On a GPU the ways
that there are are timed once for each shape behind a numerics gate, and the choice is kept like every other.
"""

import logging
import sys
from collections.abc import Callable

import torch

from slope_megatron.ops import choices
from slope_megatron.ops.autotune import timing
from slope_megatron.ops.choices import Key, Order
from slope_megatron.ops.custom_ops import adapters as adapter_products
from slope_megatron.ops.operands import augmented as joined

logger = logging.getLogger(__name__)
FORMS = ("tall", "wide")
# Each way rounds one term, or the halves of H, to 16 bits before the sum: within 2^-9 of what is no larger than a few
# times Y.
MOST_RELATIVE_ERROR = 1e-2


def product(operands, kind: str, x_TS, down_PS, up_RP, scale: float, x_of_weight=None):
    """Y = X W^T + H U^T, `[T, R]`, and H = scale X D^T, `[T, P]`, which the adapters' gradients read.

    Args:
        operands: whose W it is; `kind` "forward" or "dgrad" says which one.
        x_of_weight: what W is multiplied with where that is not X itself (a pruned gradient).
    """
    way = _way(operands, kind, x_TS, up_RP) if x_of_weight is None else "last"
    if way in FORMS:
        return operands.joined_product(kind, x_TS, down_PS, up_RP, scale)
    if way == "kernels":
        return _by_kernels(operands, kind, x_TS, down_PS, up_RP, scale)
    hidden_TP = hidden(x_TS, down_PS, scale)
    if way == "first":
        return _first(operands, kind, x_TS, hidden_TP, up_RP), hidden_TP
    return _last(operands, kind, x_TS if x_of_weight is None else x_of_weight, hidden_TP, up_RP), hidden_TP


def hidden(x_TS: torch.Tensor, down_PS: torch.Tensor, scale: float) -> torch.Tensor:
    """H = scale X D^T, the scale applied to the fp32 sums."""
    hidden_TP = x_TS.new_empty(x_TS.shape[0], down_PS.shape[0])
    # With beta 0 nothing is read of what the new tensor holds.
    return hidden_TP.addmm_(x_TS, down_PS.t(), beta=0, alpha=scale)


def _last(operands, kind, x_TS, hidden_TP, up_RP) -> torch.Tensor:
    y_TR = getattr(operands, kind)(x_TS)
    return y_TR.addmm_(hidden_TP, up_RP.t())


def _by_kernels(operands, kind, x_TS, down_PS, up_RP, scale) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_TP = adapter_products.low_rank_hidden(x_TS, down_PS, scale)
    return adapter_products.add_low_rank(getattr(operands, kind)(x_TS), hidden_TP, up_RP), hidden_TP


def _first(operands, kind, x_TS, hidden_TP, up_RP) -> torch.Tensor:
    return getattr(operands, f"{kind}_add")(x_TS, hidden_TP @ up_RP.t())


def _way(operands, kind: str, x_TS: torch.Tensor, up_RP: torch.Tensor) -> str:
    """One of the module's ways; measured the first time on a GPU."""
    rows, rank = up_RP.shape
    inner = getattr(operands, "unbiased", operands)
    in_place = getattr(inner, "joined", {}).get(kind)
    if in_place is not None:
        return in_place.form if in_place.rank == rank else "last"
    if not hasattr(inner, "forward_add"):
        return "last"
    key = Key(f"{kind}+{rank}", rows, x_TS.shape[1], x_TS.shape[0], x_TS.dtype)
    found = choices.find_order(key)
    if found is not None and found.order not in FORMS:
        return found.order
    # Measuring is not for torch.compile to trace. The decorator form would import the compiler with this module.
    adopt = torch.compiler.disable(_adopt) if "torch._dynamo" in sys.modules else _adopt
    return adopt(inner, kind, key, x_TS.device)


def _adopt(operands, kind: str, key: Key, device: torch.device) -> str:
    """Make the choice if need be, and bring the operand into the form that it wants."""
    if device.type == "cpu" and choices.find_order(key) is None:
        choices.record_order(key, Order("first" if hasattr(operands, f"{kind}_add") else "last"))
    choices.refuse_while_capturing(key, device)
    order = choices.decide_order(key, lambda: measure(operands, kind, key, device)).order
    if order not in FORMS:
        return order
    rank = rank_of(key)
    if not joined.can_join(operands, kind, key.tokens, rank):
        return "last"
    joined.join(operands, kind, order, rank)
    return order


def rank_of(key: Key) -> int:
    return int(key.kind.partition("+")[2])


@torch.no_grad()
def measure(operands, kind: str, key: Key, device: torch.device, *, rounds: int = 7) -> Order:
    """Time the ways that these operands offer, on random data. Synchronizes."""
    rank = rank_of(key)

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=key.dtype)

    x_TS, down_PS, up_RP = random(key.tokens, key.columns), random(rank, key.columns), random(key.rows, rank)
    # Terms of the size of Y's own, the hardest case for the rounding of the one that comes first.
    scale = float(getattr(operands, kind)(x_TS)[:64].float().std()) / (rank * key.columns) ** 0.5
    ways = {"last": lambda: _last(operands, kind, x_TS, hidden(x_TS, down_PS, scale), up_RP)}
    if adapter_products.suits_kernel(key.tokens, rank):
        ways["kernels"] = lambda: _by_kernels(operands, kind, x_TS, down_PS, up_RP, scale)[0]
    if hasattr(operands, f"{kind}_add"):
        ways["first"] = lambda: _first(operands, kind, x_TS, hidden(x_TS, down_PS, scale), up_RP)
    if joined.can_join(operands, kind, key.tokens, rank):
        form = joined.form_for(key.rows, key.columns)
        copy = joined.joined_copy(operands, kind, form, rank)
        ways[form] = lambda: copy.product(x_TS, down_PS, up_RP, scale)[0]
    expected = ways["last"]().float()
    for name in [name for name in ways if name != "last"]:
        problem = wrong(ways[name], expected)
        if problem:
            logger.warning("%s: way %r is not used: %s", key, name, problem)
            del ways[name]
    del expected
    rough = timing.median(timing.interleaved({"": ways["last"]}, rounds=3, calls=1)[""])
    samples = timing.interleaved(ways, rounds=rounds, calls=timing.calls_for(rough))
    times = {name: timing.median(values) for name, values in samples.items()}
    torch.cuda.empty_cache()
    return Order(min(times, key=times.__getitem__), times)


def wrong(way: Callable[[], torch.Tensor], expected: torch.Tensor) -> str | None:
    """The numerics gate: all ways compute the same but for a rounding to 16 bits. One that cannot run is none."""
    try:
        found = way()
    except torch.AcceleratorError:
        # The context is lost: nothing can run after this.
        raise
    except Exception as error:  # libraries and compilers have types of their own
        return f"it cannot run ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    difference = float((found.float() - expected).norm() / expected.norm())
    return None if difference <= MOST_RELATIVE_ERROR else f"wrong results, relative difference {difference:.1e}"
