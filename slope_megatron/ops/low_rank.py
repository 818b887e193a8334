"""A product with low-rank adapters beside it, in the order that moves Y least.

T tokens, S in, R out, P rank.   Y [T, R] = X W^T + scale H U^T,   H [T, P] = X D^T

    forward   W = W^R,          D = L^T [P, K],   U = R^T [N, P]
    dgrad     W = (W^{R,C})^T,  D = R [P, N],     U = L [K, P]

Both products end in the same Y, so one of them adds to what the other has written:

    last      Y := X W^T, then Y += scale H U^T in place: Y is written, read and written again
    first     Y := scale H U^T, then Y += X W^T: the sparse product's epilogue reads Y behind its own arithmetic

Where operands can add to a Y (`forward_add`, `dgrad_add`: X, Y -> Y + X W^T, which may overwrite Y), both are timed once
for each shape behind a numerics gate, and the choice is kept like every other (`ops.choices`).
"""

import logging
import sys

import torch

from slope_megatron.ops import choices, timing
from slope_megatron.ops.choices import Key, Order

logger = logging.getLogger(__name__)
# "first" rounds the low-rank term to 16 bits before the sum, "last" the sparse one: each within 2^-9 of a term that is
# no larger than a few times Y.
MOST_RELATIVE_ERROR = 1e-2


def product(operands, kind: str, x_TS, hidden_TP, up_RP, scale: float) -> torch.Tensor:
    """Y = X W^T + scale H U^T, `[T, R]`.

    Args:
        operands: whose W it is; `kind` "forward" or "dgrad" says which one.
        hidden_TP: H, from the caller, who needs it for the adapters' gradients.
    """
    if _order(operands, kind, x_TS, up_RP) == "first":
        return _first(operands, kind, x_TS, hidden_TP, up_RP, scale)
    return _last(operands, kind, x_TS, hidden_TP, up_RP, scale)


def scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale A B, the scale applied to the fp32 sums."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=scale)


def _last(operands, kind, x_TS, hidden_TP, up_RP, scale) -> torch.Tensor:
    y_TR = getattr(operands, kind)(x_TS)
    return y_TR.addmm_(hidden_TP, up_RP.t(), alpha=scale)


def _first(operands, kind, x_TS, hidden_TP, up_RP, scale) -> torch.Tensor:
    y_TR = x_TS.new_empty(x_TS.shape[0], up_RP.shape[0])
    # With beta 0 the product reads nothing of Y, and its scale costs no pass of its own.
    y_TR.addmm_(hidden_TP, up_RP.t(), beta=0, alpha=scale)
    return getattr(operands, f"{kind}_add")(x_TS, y_TR)


def _order(operands, kind: str, x_TS: torch.Tensor, up_RP: torch.Tensor) -> str:
    """ "first" or "last"; measured the first time on a GPU."""
    if not hasattr(operands, f"{kind}_add"):
        return "last"
    rows, rank = up_RP.shape
    key = Key(f"{kind}+{rank}", rows, x_TS.shape[1], x_TS.shape[0], x_TS.dtype)
    found = choices.find(key)
    if found is not None:
        return found.order
    # Measuring is not for torch.compile to trace. The decorator form would import the compiler with this module.
    decide = torch.compiler.disable(_decide) if "torch._dynamo" in sys.modules else _decide
    return decide(operands, kind, key, x_TS.device)


def _decide(operands, kind: str, key: Key, device: torch.device) -> str:
    if device.type == "cpu":
        choices.record(key, Order("first"))
    elif torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{key} has not run yet with adapters and a CUDA graph is being captured: run it once before capturing"
        )
    return choices.decide(key, lambda: measure(operands, kind, key, device)).order


@torch.no_grad()
def measure(operands, kind: str, key: Key, device: torch.device, *, rounds: int = 9) -> Order:
    """Time both orders on random data. Synchronizes."""
    rank = int(key.kind.partition("+")[2])
    x_TS = torch.randn(key.tokens, key.columns, device=device, dtype=key.dtype)
    hidden_TP = torch.randn(key.tokens, rank, device=device, dtype=key.dtype)
    up_RP = torch.randn(key.rows, rank, device=device, dtype=key.dtype)
    # Terms of the size of Y's own, the hardest case for the rounding of the one that comes first.
    scale = float(getattr(operands, kind)(x_TS)[:64].float().std()) / rank**0.5
    arguments = (operands, kind, x_TS, hidden_TP, up_RP, scale)
    problem = wrong(*arguments)
    if problem:
        logger.warning("%s: adding to the low-rank product gives wrong results and is not used: %s", key, problem)
        return Order("last")
    functions = {"first": lambda: _first(*arguments), "last": lambda: _last(*arguments)}
    rough = timing.median(timing.interleaved({"": functions["last"]}, rounds=3, calls=1)[""])
    samples = timing.interleaved(functions, rounds=rounds, calls=timing.calls_for(rough))
    first_ms, last_ms = (timing.median(samples[order]) for order in ("first", "last"))
    torch.cuda.empty_cache()
    return Order("first" if first_ms < last_ms else "last", first_ms, last_ms)


def wrong(*arguments) -> str | None:
    """The numerics gate: both orders round one term to 16 bits and must agree but for that."""
    expected = _last(*arguments).float()
    difference = float((_first(*arguments).float() - expected).norm() / expected.norm())
    return None if difference <= MOST_RELATIVE_ERROR else f"relative difference {difference:.1e}"
