"""The linears that blocks are built from, one class for each mode; all are called with (out, in, has a bias)."""

import torch
import torch.nn.functional as F

from slope_megatron.linear import slope_linear
from slope_megatron.ops.backend import build_operands
from slope_megatron.ops.cusparselt import bias_gradient
from slope_megatron.ops.measure import random_bits
from slope_megatron.ops.products import choose_column

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

    adapters = None

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, columns // 2, device="cuda", dtype=DTYPE) * 0.02)
        self.bias = torch.nn.Parameter(torch.randn(rows, device="cuda", dtype=DTYPE) * 0.02) if bias else None
        row_bits = random_bits(rows, columns, torch.device("cuda"))
        column_bits = choose_column(self.weight.detach(), row_bits)
        self.operands = build_operands("auto", self.weight.detach(), row_bits, column_bits)

    def forward(self, x):
        if self.bias is None:
            return slope_linear(x, self.weight, self.operands, adapters=self.adapters)
        biased = self.operands.with_bias(self.bias)
        return bias_gradient(slope_linear(x, self.weight, biased, adapters=self.adapters), self.bias)

    def refresh(self) -> None:
        self.operands.refresh(self.weight.detach())


class WithAdapters(Sparse):
    """And with low-rank adapters of some rank."""

    def __init__(self, rows: int, columns: int, bias: bool, *, rank: int):
        super().__init__(rows, columns, bias)
        self.adapter_l = torch.nn.Parameter(torch.randn(rank, columns, device="cuda", dtype=DTYPE))
        self.adapter_r = torch.nn.Parameter(torch.randn(rows, rank, device="cuda", dtype=DTYPE) * 0.02)
        self.adapters = (self.adapter_l, self.adapter_r)


# What `slope bench block --modes` and its kin take; dense is measured beside them always.
MODES: dict[str, type] = {"dense": Dense, "paper": Sparse}
# The products that a mode may run sparse, as `ops.choices` names them.
SPARSE_PRODUCTS = {"paper": ("forward", "dgrad")}
