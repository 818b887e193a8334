"""The `reference` backend: unpack once per optimizer step, then dense products. Any device, any dtype; not fast."""

import torch

from slope_megatron.ops.choices import PRODUCTS, Product
from slope_megatron.ops.operands.protocol import not_held
from slope_megatron.ops.update import handed_on
from slope_megatron.sparsity.mvue_rng import MvueRng
from slope_megatron.sparsity.packing import kept_index, unpack_bits

DESCRIPTION = "unpack and dense product"


def unsupported() -> None:
    """It runs everywhere."""
    return None


def build(
    values_NC: torch.Tensor, row_bits: torch.Tensor, column_bits: torch.Tensor, products: tuple[Product, ...] = PRODUCTS
) -> "ReferenceOperands":
    operands = ReferenceOperands(unpack_bits(row_bits), values_NC.dtype, products)
    operands.set_column_pattern(column_bits, values_NC)
    return operands


class ReferenceOperands:
    """W^R and W^{R,C} as dense matrices, and where their kept weights are. N out, K in, C kept per row, T tokens."""

    # From the first `set_column_pattern` on.
    column_NC: torch.Tensor

    def __init__(self, row_NK: torch.Tensor, dtype: torch.dtype, products: tuple[Product, ...] = PRODUCTS):
        self.index_NC = kept_index(row_NK)

        def zeros() -> torch.Tensor:
            return torch.zeros(row_NK.shape, dtype=dtype, device=row_NK.device)

        self.forward_NK = zeros() if Product.FORWARD in products else None
        self.backward_NK = zeros() if Product.DGRAD in products else None

    @torch.no_grad()
    def refresh(self, values_NC: torch.Tensor) -> None:
        if self.forward_NK is not None:
            self.forward_NK.scatter_(1, self.index_NC, values_NC)
        if self.backward_NK is not None:
            self.backward_NK.scatter_(1, self.index_NC, values_NC * self.column_NC)

    @torch.no_grad()
    def set_column_pattern(self, column_bits: torch.Tensor, values_NC: torch.Tensor) -> None:
        self.column_NC = unpack_bits(column_bits)
        self.refresh(values_NC)

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        if self.forward_NK is None:
            raise not_held(Product.FORWARD)
        return x_TK @ self.forward_NK.t()

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        if self.backward_NK is None:
            raise not_held(Product.DGRAD)
        return dy_TN @ self.backward_NK

    def wgrad(
        self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None, total: torch.Tensor | None = None
    ):
        read_TN = rng.estimate(dy_TN) if rng else dy_TN
        return handed_on((read_TN.t() @ x_TK).gather(1, self.index_NC), total)


class ForwardOnly:
    """A dense matrix `[N, K]`, for inference; a bias is added by the product's epilogue, as to a packed one."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None):
        self.weight_NK, self.bias_N = weight_NK, bias_N

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x_TK, self.weight_NK, self.bias_N)

    def with_bias(self, bias_N: torch.Tensor) -> "ForwardOnly":
        return ForwardOnly(self.weight_NK, bias_N)
