"""The linears that blocks are built from, one class for each mode; all are called with (out, in, has a bias)."""

import torch
import torch.nn.functional as F

from slope_megatron.linear import slope_linear
from slope_megatron.ops.backend import build_operands
from slope_megatron.ops.bias import bias_gradient
from slope_megatron.ops.measure import random_bits
from slope_megatron.ops.products import choose_column
from slope_megatron.sparsity.token_draws import TokenDraws, as_int32, stream_table

DTYPE = torch.bfloat16


class Dense(torch.nn.Module):
    """Y = X W^T (+ b)."""

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, columns, device="cuda", dtype=DTYPE) * 0.02)
        self.bias = torch.nn.Parameter(torch.randn(rows, device="cuda", dtype=DTYPE) * 0.02) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Sparse(torch.nn.Module):
    """The same with a packed 2:4 weight, in `paper` mode."""

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, columns // 2, device="cuda", dtype=DTYPE) * 0.02)
        self.bias = torch.nn.Parameter(torch.randn(rows, device="cuda", dtype=DTYPE) * 0.02) if bias else None
        row_bits = random_bits(rows, columns, torch.device("cuda"))
        column_bits = choose_column(self.weight.detach(), row_bits)
        self.operands = build_operands("auto", self.weight.detach(), row_bits, column_bits)

    def forward(self, x):
        if self.bias is None:
            return self.product(x, self.operands)
        return bias_gradient(self.product(x, self.operands.with_bias(self.bias)), self.bias)

    def product(self, x, operands):
        return slope_linear(x, self.weight, operands)

    def refresh(self) -> None:
        self.operands.refresh(self.weight.detach())


class WithAdapters(Sparse):
    """And with low-rank adapters of some rank."""

    def __init__(self, rows: int, columns: int, bias: bool, *, rank: int):
        super().__init__(rows, columns, bias)
        self.adapter_l = torch.nn.Parameter(torch.randn(rank, columns, device="cuda", dtype=DTYPE))
        self.adapter_r = torch.nn.Parameter(torch.randn(rows, rank, device="cuda", dtype=DTYPE) * 0.02)

    def product(self, x, operands):
        return slope_linear(x, self.weight, operands, adapters=(self.adapter_l, self.adapter_r))


def fixed_draws(rows: int) -> TokenDraws:
    """Draws for a gradient of so many outputs; the same every time."""
    key, streams = as_int32([1, 2]), stream_table([(3, 4)], [range(rows)])
    return TokenDraws(key.cuda(), streams.cuda(), 2, 4)


class Full(Sparse):
    """In `full` mode: wgrad reads the unbiased 2:4 estimate of dY."""

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__(rows, columns, bias)
        self.draws = fixed_draws(rows)

    def product(self, x, operands):
        return slope_linear(x, self.weight, operands, draws=self.draws)


# What `slope bench block --modes` and its kin take; dense is measured beside them always.
MODES: dict[str, type] = {"dense": Dense, "paper": Sparse, "full": Full}
# The products that a mode may run sparse, as `ops.choices` names them.
SPARSE_PRODUCTS = {"paper": ("forward", "dgrad"), "full": ("forward", "dgrad", "wgrad")}
