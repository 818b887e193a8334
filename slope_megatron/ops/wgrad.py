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

from slope_megatron.ops import choices, layout, measure, mvue
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.ops.products import gather_kept
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
        libraries: whose sparse product it may be; one that was asked for by name runs whatever was chosen earlier.
    Raises:
        ValueError: the sparse product was asked for by name, and nothing here can write its operand or compute it.
    """
    if (draws.n, draws.m) != (2, 4):
        _say_once(f"full mode: {draws.n}:{draws.m} gradients are estimated in plain torch; the kernel is for 2:4")
        return gather_kept(draws.estimate(dy_TN).t() @ x_TK, row_bits)
    key = Key("wgrad", dy_TN.shape[1], x_TK.shape[1], dy_TN.shape[0], dy_TN.dtype)
    choice = choices.find(key)
    if choice is None:
        # As for the other products: measuring is not for torch.compile to trace.
        choose = torch.compiler.disable(_choose) if torch.compiler.is_compiling() else _choose
        choice = choose(key, dy_TN.device, dense_allowed, libraries)
    if dense_allowed and not choice.sparse:
        return gather_kept(dy_TN.t() @ x_TK, row_bits)
    ours = "cutlass" in libraries and (choice.by_cutlass or "cusparselt" not in libraries)
    operand = mvue.mvue_operand(dy_TN, draws.key, draws.streams, ours)
    if ours:
        return mvue.packed_wgrad(operand, x_TK, row_bits)
    return gather_kept(mvue.sparse_wgrad(operand, x_TK, dy_TN.shape[1]), row_bits)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


@torch.no_grad()
def _choose(key: Key, device: torch.device, dense_allowed: bool, libraries: tuple[str, ...]) -> Choice:
    if device.type == "cpu":
        return choices.decide(key, lambda: Choice(True))
    choices.refuse_while_capturing(key, device)
    if "cusparselt" in libraries and not layout.probe(device, key.dtype).known_metadata:
        libraries = tuple(library for library in libraries if library != "cusparselt")
        if not libraries and not dense_allowed:
            raise ValueError(
                f"--slope-mode full with --slope-backend cusparselt: the operand of {key} is written in sm_90's layout "
                f"and {device} has another; use --slope-backend auto, whose wgrad is then dense and exact"
            )
    measured = functools.partial(measure.measure, key, device, dense_allowed=dense_allowed, libraries=libraries)
    return choices.decide(key, measured if libraries else lambda: Choice(False))
