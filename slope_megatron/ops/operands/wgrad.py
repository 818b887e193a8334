"""wgrad of `full` mode: dW = P(dY)^T X at the kept places, or the exact dY^T X where that is faster.

T tokens, N out, K in, C = K/2 kept per row; P the unbiased 2:4 estimate along the tokens. A pass over dY writes the
operand of P(dY)^T, and then there are two sparse ways, and a dense one:
    cuSPARSELt     dense dW [N, K], rounded to 16 bits, then its kept half gathered: [N, C]
    our kernels    the kept half alone, straight from the sums (`slope_kernels.packed_wgrad`)
    dense          dY^T X, gathered
What is measured goes from dY to the packed gradient in each. Where the dense product wins, pruning would add variance
and time: dY itself is multiplied.
"""

import functools
import logging

import torch

from slope_kernels import cutlass
from slope_megatron.ops import choices
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.ops.custom_ops import layout, mvue
from slope_megatron.ops.custom_ops.products import gather_kept
from slope_megatron.sparsity.token_draws import TokenDraws

logger = logging.getLogger(__name__)


def packed(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    row_bits: torch.Tensor,
    draws: TokenDraws,
    *,
    dense_allowed: bool = True,
    libraries: tuple[str, ...] = measure.LIBRARIES,
) -> torch.Tensor:
    """P(dY)^T X at the kept places, `[N, C]`; dY^T X there where its choice says so.

    Args:
        row_bits: bitmask uint8 `[N, K/8]` of the kept places.
        libraries: whose sparse product it may be. A choice of another one, made in this process for another backend,
            is made anew.
    Raises:
        ValueError: the sparse product was asked for by name, and nothing here can write its operand or compute it.
    """
    if (draws.n, draws.m) != (2, 4):
        _say_once(f"full mode: {draws.n}:{draws.m} gradients are estimated in plain torch; the kernel is for 2:4")
        return gather_kept(draws.estimate(dy_TN).t() @ x_TK, row_bits)
    key = Key("wgrad", dy_TN.shape[1], x_TK.shape[1], dy_TN.shape[0], dy_TN.dtype)
    choice = choices.find(key)
    if choice is None or not _fits(choice, dense_allowed, libraries):
        # As for the other products: measuring is not for torch.compile to trace.
        choose = torch.compiler.disable(_choose) if torch.compiler.is_compiling() else _choose
        choice = choose(key, dy_TN.device, dense_allowed, libraries)
    if not choice.sparse:
        return gather_kept(dy_TN.t() @ x_TK, row_bits)
    # A CPU's choice names no library.
    ours = choice.by_cutlass or "cusparselt" not in libraries
    operand = mvue.mvue_operand(dy_TN, draws.key, draws.streams, ours)
    if ours:
        return mvue.packed_wgrad(operand, x_TK, row_bits)
    return gather_kept(mvue.sparse_wgrad(operand, x_TK, dy_TN.shape[1]), row_bits)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _fits(choice: Choice, dense_allowed: bool, libraries: tuple[str, ...]) -> bool:
    """Whether a choice that was made before is one of those that are allowed now."""
    if not choice.sparse:
        return dense_allowed
    return choice.algorithm is None or ("cutlass" if choice.by_cutlass else "cusparselt") in libraries


@torch.no_grad()
def _choose(key: Key, device: torch.device, dense_allowed: bool, libraries: tuple[str, ...]) -> Choice:
    fits = functools.partial(_fits, dense_allowed=dense_allowed, libraries=libraries)
    if device.type == "cpu":
        return choices.decide(key, lambda: Choice(True), fits)
    choices.refuse_while_capturing(key, device)
    reasons = {library: _unusable(library, key, device) for library in libraries}
    usable = tuple(library for library, reason in reasons.items() if reason is None)
    if usable:
        measured = functools.partial(measure.measure, key, device, dense_allowed=dense_allowed, libraries=usable)
        return choices.decide(key, measured, fits)
    if dense_allowed:
        return choices.decide(key, lambda: Choice(False), fits)
    raise ValueError(
        f"--slope-mode full has no 2:4 product for {key}: {'; '.join(map(str, reasons.values()))}; "
        "use --slope-backend auto, whose wgrad is then dense and exact"
    )


def _unusable(library: str, key: Key, device: torch.device) -> str | None:
    """Why a library cannot compute this wgrad here; None: it can."""
    if library == "cutlass":
        return cutlass.unsupported() or cutlass.unsupported_shape(key.rows, key.columns, key.dtype)
    if layout.probe(device, key.dtype).known_metadata:
        return None
    return f"cuSPARSELt's operand is written in sm_90's layout and {device} has another"
