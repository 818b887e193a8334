"""The `reference` backend: unpack once per optimizer step, then dense products. Any device, any dtype; not fast."""

import torch

from slope_megatron.sparsity.packing import kept_index, unpack, unpack_bits
from slope_megatron.sparsity.token_draws import TokenDraws

PRODUCTS = ("forward", "dgrad", "wgrad")


def unsupported() -> None:
    """It runs everywhere."""
    return None


def build(
    values_NC: torch.Tensor, row_NK: torch.Tensor, column_NC: torch.Tensor, products: tuple[str, ...] = PRODUCTS
) -> "ReferenceOperands":
    operands = ReferenceOperands(row_NK, values_NC.dtype, products)
    operands.set_column_pattern(column_NC, values_NC)
    return operands


def held(buffer: torch.Tensor | None, product: str) -> torch.Tensor:
    """A buffer that a product reads.

    Raises:
        RuntimeError: it is not there: the operands were built for other products.
    """
    if buffer is None:
        raise RuntimeError(f"these operands hold nothing for {product}: build them with it among their products")
    return buffer


class ReferenceOperands:
    """W^R and W^{R,C} as dense matrices, and where their kept weights are. N out, K in, C kept per row, T tokens."""

    # From the first `set_column_pattern` on.
    column_NC: torch.Tensor

    def __init__(self, row_NK: torch.Tensor, dtype: torch.dtype, products: tuple[str, ...] = PRODUCTS):
        self.index_NC = kept_index(row_NK)

        def zeros() -> torch.Tensor:
            return torch.zeros(row_NK.shape, dtype=dtype, device=row_NK.device)

        self.forward_NK = zeros() if "forward" in products else None
        self.backward_NK = zeros() if "dgrad" in products else None

    @torch.no_grad()
    def refresh(self, values_NC: torch.Tensor) -> None:
        if self.forward_NK is not None:
            self.forward_NK.scatter_(1, self.index_NC, values_NC)
        if self.backward_NK is not None:
            self.backward_NK.scatter_(1, self.index_NC, values_NC * self.column_NC)

    @torch.no_grad()
    def set_column_pattern(self, column: torch.Tensor, values_NC: torch.Tensor) -> None:
        self.column_NC = column if column.dtype == torch.bool else unpack_bits(column)
        self.refresh(values_NC)

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return x_TK @ held(self.forward_NK, "forward").t()

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        return dy_TN @ held(self.backward_NK, "dgrad")

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, draws: TokenDraws | None = None) -> torch.Tensor:
        read_TN = draws.estimate(dy_TN) if draws else dy_TN
        return (read_TN.t() @ x_TK).gather(1, self.index_NC)


class ForwardOnly:
    """W^R as a dense matrix, for inference."""

    def __init__(self, values_NC: torch.Tensor, row_NK: torch.Tensor):
        self.forward_NK = unpack(values_NC, row_NK)

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return x_TK @ self.forward_NK.t()
