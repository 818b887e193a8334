"""wgrad of `full` mode: dW = P(dY)^T X at the kept positions, or the exact dY^T X where that is faster.

T tokens, N out, K in, C = K/2 kept per row; P the unbiased 2:4 estimate along the tokens. A pass over dY writes the
operand of P(dY)^T, and then there are two sparse strategies, and a dense one:
    cuSPARSELt     dense dW [N, K], rounded to 16 bits, then its kept half gathered: [N, C]
    our kernels    the kept half alone, straight from the sums (`slope_kernels.packed_wgrad`)
    dense          dY^T X, gathered
What is measured goes from dY to the packed gradient in each. Where the dense product wins, pruning would add variance
and time: dY itself is multiplied.
"""

import functools
import logging
from typing import Any

import torch

from slope_megatron.ops import libraries
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.autotune.resolve import resolve
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.operands import cusparselt
from slope_megatron.ops.update import kept
from slope_megatron.sparsity.mvue_rng import MvueRng

logger = logging.getLogger(__name__)
LIBRARIES = libraries.load()


def packed(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    row_bits: torch.Tensor,
    rng: MvueRng,
    total: torch.Tensor | None = None,
    *,
    dense_allowed: bool = True,
    among: tuple[str, ...] = tuple(LIBRARIES),
) -> torch.Tensor | None:
    """P(dY)^T X at the kept positions, `[N, C]`; dY^T X there where its choice says so.

    Args:
        row_bits: bitmask uint8 `[N, K/8]` of the kept positions.
        total: fp32 `[N, C]`, to which the result is added; None is returned then.
        among: the libraries whose sparse product it may be. A choice of another one, made in this process for another
            backend, is made anew.
    Raises:
        ValueError: the sparse product was asked for by name, and nothing here can write its operand or compute it.
    """
    if (rng.n, rng.m) != (2, 4):
        _say_once(f"full mode: {rng.n}:{rng.m} gradients are estimated in plain torch; the kernel is for 2:4")
        return kept(rng.estimate(dy_TN).t() @ x_TK, row_bits, total)
    key, device = Key(Product.WGRAD, dy_TN.shape[1], x_TK.shape[1], dy_TN.shape[0], dy_TN.dtype), dy_TN.device
    allowed: dict[str, Any] = {"dense_allowed": dense_allowed, "among": among}
    choice = resolve(
        key,
        device,
        functools.partial(_measure, key, device, **allowed),
        on_cpu=Choice(True),
        fits=functools.partial(_fits, **allowed),
        check=functools.partial(_check, key, device, **allowed),
    )
    if not choice.sparse:
        return kept(dy_TN.t() @ x_TK, row_bits, total)
    # A CPU's choice names no library.
    return LIBRARIES[choice.library or among[0]].wgrad(dy_TN, x_TK, row_bits, rng, total)


def dense(dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng) -> torch.Tensor:
    """P(dY)^T X with nothing dropped, `[N, K]`: FST's. On 2:4 tensor cores where they can, else in plain torch.

    The estimate is the same to the bit.
    """
    key, device = Key(Product.WGRAD, dy_TN.shape[1], x_TK.shape[1], dy_TN.shape[0], dy_TN.dtype), dy_TN.device
    reason = _unsupported_dense(key, device, rng)
    if reason:
        _say_once(f"the estimate of the gradients is computed in plain torch: {reason}")
        return rng.estimate(dy_TN).t() @ x_TK
    measured = functools.partial(_measure_dense, key, device)
    fits = (cusparselt.NAME, None)
    choice = resolve(key, device, measured, on_cpu=Choice(True), fits=lambda choice: choice.library in fits)
    return cusparselt.dense_wgrad(dy_TN, x_TK, rng) if choice.sparse else rng.estimate(dy_TN).t() @ x_TK


def _measure_dense(key: Key, device: torch.device) -> Choice:
    """The fastest sparse one; dense means the estimate in plain torch, which is far slower."""
    try:
        return measure.measure(key, device, dense_allowed=False, among=(cusparselt.NAME,))
    except ValueError as error:
        logger.warning("the estimate of the gradients is computed in plain torch: %s", error)
        return Choice(False)


def _unsupported_dense(key: Key, device: torch.device, rng: MvueRng) -> str | None:
    if device.type != "cuda":
        return "no CUDA device"
    if (rng.n, rng.m) != (2, 4):
        return f"the kernel is for 2:4, not for {rng.n}:{rng.m}"
    if key.dtype not in (torch.bfloat16, torch.float16) or key.rows % 64:
        return f"the kernel takes 16-bit gradients of multiples of 64 outputs, not {key.dtype} of {key.rows}"
    return cusparselt.unsupported() or cusparselt.unsupported_wgrad(key, device)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _fits(choice: Choice, dense_allowed: bool, among: tuple[str, ...]) -> bool:
    """Whether a choice that was made before is one of those that are allowed now."""
    if not choice.sparse:
        return dense_allowed
    return choice.library is None or choice.library in among


def _reasons(key: Key, device: torch.device, among: tuple[str, ...]) -> dict[str, str | None]:
    """Why each library cannot run this wgrad; None: it can."""
    return {name: LIBRARIES[name].unsupported_wgrad(key, device) for name in among}


def _check(key: Key, device: torch.device, *, dense_allowed: bool, among: tuple[str, ...]) -> None:
    reasons = _reasons(key, device, among)
    if not dense_allowed and all(reasons.values()):
        raise ValueError(
            f"--slope-mode full has no 2:4 product for {key}: {'; '.join(map(str, reasons.values()))}; "
            "use --slope-backend auto, whose wgrad is then dense and exact"
        )


def _measure(key: Key, device: torch.device, *, dense_allowed: bool, among: tuple[str, ...]) -> Choice:
    usable = tuple(name for name, reason in _reasons(key, device, among).items() if reason is None)
    if not usable:
        return Choice(False)
    return measure.measure(key, device, dense_allowed=dense_allowed, among=usable)
