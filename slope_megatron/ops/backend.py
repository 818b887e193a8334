"""Backends: who computes the three products, on which machine, and why not elsewhere."""

import functools
import itertools
import logging
from typing import Any, Protocol

import torch

from slope_megatron.ops import libraries
from slope_megatron.ops.choices import PRODUCTS, Product
from slope_megatron.ops.custom_ops import products
from slope_megatron.ops.operands import cusparselt, float8, reference
from slope_megatron.ops.operands.packed import PackedOperands
from slope_megatron.sparsity.mvue_rng import MvueRng
from slope_megatron.sparsity.packing import pack, pack_bits, unpack, unpack_bits
from slope_megatron.sparsity.pattern import column_pattern
from slope_megatron.sparsity.pieces import rows_at_once

logger = logging.getLogger(__name__)


class ForwardProduct(Protocol):
    """The product of inference. T tokens, N out, K in."""

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Y = X (W^R)^T, `[T, N]`."""


class Products(ForwardProduct, Protocol):
    """The three products of training. T tokens, N out, K in, C kept per row.

    Those that round their inputs may also have `rounded_input(x_TK)`, called before forward: two tensors, which
    `wgrad_of_rounded(dy_TN, *them, total)` wants in place of X; None where wgrad wants X itself.
    """

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dX = dY W^{R,C}, `[T, K]`."""

    def wgrad(
        self,
        dy_TN: torch.Tensor,
        x_TK: torch.Tensor,
        rng: MvueRng | None = None,
        total: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """dW = dY^T X read at the kept positions, `[N, C]`; with an rng P(dY)^T X, P the unbiased estimate it draws.

        Args:
            total: fp32 `[N, C]`, to which dW is added; None is returned then.
        """


class Following(Products, Protocol):
    """Products of something derived from a weight's values, which can follow them.

    The values are the state; operands are rebuilt from them and are never saved. Operands that read the values where
    they lie also have `rebind(values)`, cheap and called before each use: the same values are here now.
    """

    def refresh(self, values: torch.Tensor) -> None:
        """New values, same patterns: after every optimizer step."""


class Operands(Following, Protocol):
    """What one backend derives from a packed weight. N out, C kept per row."""

    def set_column_pattern(self, column_bits: torch.Tensor, values_NC: torch.Tensor) -> None:
        """A new second pruning (a bitmask uint8 `[N, C/8]`), with the values to go with it."""


FIRST, *OTHERS = libraries.load().items()
# In the order in which "auto" tries them. The other libraries are for asking: their kernels are candidates of the
# first one's operands too.
BACKENDS: dict[str, Any] = dict((FIRST, ("reference", reference), *OTHERS))


def available() -> dict[str, str | None]:
    """Each backend and the reason why this machine cannot run it; None: it can."""
    return {name: module.unsupported() for name, module in BACKENDS.items()}


@functools.cache
def choose(requested: str) -> str:
    """The backend for `requested` ("auto" or a name). Logs the choice and its reason once.

    Raises:
        ValueError: a backend was asked for by name and cannot run here.
    """
    reasons = available()
    if requested != "auto":
        if reasons[requested]:
            raise ValueError(
                f"--slope-backend {requested} cannot run here: {reasons[requested]}; use --slope-backend auto"
            )
        logger.info("sparse products: backend %s, as requested", requested)
        return requested
    chosen = next(name for name, reason in reasons.items() if reason is None)
    tried = itertools.takewhile(lambda name: name != chosen, reasons)
    refused = "".join(f"; {name}: {reasons[name]}" for name in tried)
    logger.info("sparse products: backend %s (%s)%s", chosen, BACKENDS[chosen].DESCRIPTION, refused)
    return chosen


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def choose_for(backend: str, values_NC: torch.Tensor, row_bits: torch.Tensor) -> str:
    """The backend of one weight: the chosen one, or `reference` where "auto"'s choice cannot run this weight.

    Raises:
        ValueError: a backend was asked for by name and cannot run here, or not this weight.
    """
    name = choose(backend)
    reason = BACKENDS[name].unsupported_weight(values_NC, row_bits) if name != "reference" else None
    if reason is None:
        return name
    if backend != "auto":
        raise ValueError(f"--slope-backend {backend} cannot run a weight: {reason}; use --slope-backend auto")
    _say_once(f"sparse products: some weights run on backend reference: {reason}")
    return "reference"


def build_forward(backend: str, values_NC: torch.Tensor, row_bits: torch.Tensor) -> ForwardProduct:
    """What inference reads of one packed weight.

    On 2:4 units that is always the sparse operand: a dense copy beside it would make the model larger than a dense one.

    Args:
        row_bits: as for `build_operands`.
    Raises:
        ValueError: as there.
    """
    name = choose_for(backend, values_NC, row_bits)
    if name == "reference":
        return reference.ForwardOnly(unpack(values_NC, unpack_bits(row_bits)))
    return PackedOperands(
        values_NC, row_bits, None, library=name, dense_allowed=False, products_wanted=(Product.FORWARD,)
    )


def build_operands(
    backend: str, values_NC, row_bits, column_bits, products_wanted=PRODUCTS, *, float8_kinds: tuple[str, ...] = ()
) -> Operands:
    """Operands of one packed weight.

    Args:
        row_bits: the row pattern, a bitmask uint8 `[N, K/8]`; both bitmasks are kept by reference.
        column_bits: the second pruning, a bitmask uint8 `[N, C/8]`.
        products_wanted: those that they will serve.
        float8_kinds: the products that are in e4m3: none, ("forward", "dgrad"), or all three.
    Raises:
        ValueError: a backend was asked for by name and cannot run here, or not this weight.
    """
    if float8_kinds:
        choose(backend)
        return build_float8_operands(
            backend, values_NC, row_bits, column_bits, products_wanted, wgrad=Product.WGRAD in float8_kinds
        )
    name = choose_for(backend, values_NC, row_bits)
    if name == "reference":
        return reference.build(values_NC, row_bits, column_bits, products_wanted)
    return PackedOperands(
        values_NC,
        row_bits,
        column_bits,
        library=name,
        dense_allowed=backend == "auto",
        products_wanted=products_wanted,
    )


def check_weight(backend: str, values_NC, row_bits, float8_kinds: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: `build_operands` would refuse a weight of this shape, type and row pattern.
    """
    if float8_kinds:
        choose(backend)
        float8_emulated(backend, values_NC, row_bits)
    else:
        choose_for(backend, values_NC, row_bits)


def float8_emulated(backend: str, values_NC, row_bits) -> bool:
    """Whether products in e4m3 are emulated: off the GPU, or where the backend `reference` was asked for.

    Raises:
        ValueError: this GPU or this weight has no such product.
    """
    if values_NC.device.type != "cuda" or backend == "reference":
        return True
    reason = float8.unsupported() or float8.unsupported_weight(values_NC, row_bits)
    if reason:
        raise ValueError(f"--slope-fp8 cannot run here: {reason}; use --slope-fp8 off")
    return False


def build_float8_operands(backend: str, values_NC, row_bits, column_bits, products_wanted, *, wgrad: bool) -> Operands:
    """The same for products in e4m3; off the GPU, or where the backend `reference` was asked for, emulated.

    Raises:
        ValueError: this GPU or this weight has no such product: nobody wants a slow emulation there.
    """
    if not float8_emulated(backend, values_NC, row_bits):
        _say_once(f"sparse products: in e4m3, {'all three' if wgrad else 'wgrad in the type of the parameters'}")
        return float8.Float8Operands(
            values_NC,
            row_bits,
            column_bits,
            wgrad=wgrad,
            dense_allowed=backend == "auto",
            products_wanted=products_wanted,
        )
    _say_once("sparse products: e4m3 is emulated, by rounding and then multiplying in the type of the parameters")
    operands = float8.EmulatedFloat8Operands(unpack_bits(row_bits), values_NC.dtype, products_wanted, wgrad=wgrad)
    operands.set_column_pattern(column_bits, values_NC)
    return operands


def choose_column_bits(values_NC: torch.Tensor, row_bits: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The second pruning of the present values by magnitude: bitmask uint8 `[N, C/8]`, the same on every backend.

    One kernel for 2:4 in 16 bits on a GPU; elsewhere plain torch, some rows at a time to bound its scratch memory.
    """
    kernel_takes = values_NC.dtype in (torch.bfloat16, torch.float16) and values_NC.shape[1] % 16 == 0
    if (n, m) == (2, 4) and kernel_takes and values_NC.is_cuda and cusparselt.unsupported() is None:
        return products.choose_column(values_NC, row_bits)
    parts = []
    rows = rows_at_once(8 * row_bits.shape[1], row_bits.device)
    for values, bits in zip(values_NC.split(rows), row_bits.split(rows), strict=True):
        row_NK = unpack_bits(bits)
        parts.append(pack_bits(pack(column_pattern(unpack(values, row_NK), row_NK, n, m), row_NK)))
    return torch.cat(parts)
