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

from slope_megatron.ops import choices, libraries
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.autotune.resolve import resolve, uncompiled
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops.products import gather_kept
from slope_megatron.sparsity.mvue_rng import MvueRng

logger = logging.getLogger(__name__)
LIBRARIES = libraries.load()


def packed(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    row_bits: torch.Tensor,
    rng: MvueRng,
    *,
    dense_allowed: bool = True,
    among: tuple[str, ...] = tuple(LIBRARIES),
) -> torch.Tensor:
    """P(dY)^T X at the kept places, `[N, C]`; dY^T X there where its choice says so.

    Args:
        row_bits: bitmask uint8 `[N, K/8]` of the kept places.
        among: the libraries whose sparse product it may be. A choice of another one, made in this process for another
            backend, is made anew.
    Raises:
        ValueError: the sparse product was asked for by name, and nothing here can write its operand or compute it.
    """
    if (rng.n, rng.m) != (2, 4):
        _say_once(f"full mode: {rng.n}:{rng.m} gradients are estimated in plain torch; the kernel is for 2:4")
        return gather_kept(rng.estimate(dy_TN).t() @ x_TK, row_bits)
    key = Key(Product.WGRAD, dy_TN.shape[1], x_TK.shape[1], dy_TN.shape[0], dy_TN.dtype)
    choice = choices.find(key)
    if choice is None or not _fits(choice, dense_allowed, among):
        choice = uncompiled(_resolve)(key, dy_TN.device, dense_allowed, among)
    if not choice.sparse:
        return gather_kept(dy_TN.t() @ x_TK, row_bits)
    # A CPU's choice names no library.
    return LIBRARIES[choice.library or among[0]].wgrad(dy_TN, x_TK, row_bits, rng)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _fits(choice: Choice, dense_allowed: bool, among: tuple[str, ...]) -> bool:
    """Whether a choice that was made before is one of those that are allowed now."""
    if not choice.sparse:
        return dense_allowed
    return choice.library is None or choice.library in among


@torch.no_grad()
def _resolve(key: Key, device: torch.device, dense_allowed: bool, among: tuple[str, ...]) -> Choice:
    fits = functools.partial(_fits, dense_allowed=dense_allowed, among=among)
    if device.type == "cpu":
        return resolve(key, device, lambda: Choice(True), on_cpu=Choice(True), fits=fits)
    reasons = {name: LIBRARIES[name].unsupported_wgrad(key, device) for name in among}
    usable = tuple(name for name, reason in reasons.items() if reason is None)
    if usable:
        measured = functools.partial(measure.measure, key, device, dense_allowed=dense_allowed, among=usable)
    elif dense_allowed:
        measured = functools.partial(Choice, False)
    else:
        raise ValueError(
            f"--slope-mode full has no 2:4 product for {key}: {'; '.join(map(str, reasons.values()))}; "
            "use --slope-backend auto, whose wgrad is then dense and exact"
        )
    return resolve(key, device, measured, on_cpu=Choice(True), fits=fits)
