"""The linears that blocks are built from, one class for each mode; all are called with (out, in, has a bias)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from slope_megatron.bench.dense_float8 import DenseFloat8Function
from slope_megatron.linear import slope_linear
from slope_megatron.ops.autotune.trials import random_bits
from slope_megatron.ops.backend import build_operands
from slope_megatron.ops.custom_ops.float8 import quantize
from slope_megatron.ops.custom_ops.products import choose_column
from slope_megatron.ops.operands.bias import bias_gradient
from slope_megatron.sparsity.mvue_rng import MvueRng, as_int32, stream_table

# (out, in, with a bias) -> a linear: one of the classes below, or one with its rank bound.
LinearMaker = Callable[[int, int, bool], torch.nn.Module]
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

    backend = "auto"
    float8_kinds: tuple[str, ...] = ()

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, columns // 2, device="cuda", dtype=DTYPE) * 0.02)
        self.bias = torch.nn.Parameter(torch.randn(rows, device="cuda", dtype=DTYPE) * 0.02) if bias else None
        row_bits = random_bits(rows, columns, torch.device("cuda"))
        column_bits = choose_column(self.weight.detach(), row_bits)
        patterns = (row_bits, column_bits)
        self.operands = build_operands(self.backend, self.weight.detach(), *patterns, float8_kinds=self.float8_kinds)

    def forward(self, x):
        if self.bias is None:
            return self.product(x, self.operands)
        if not hasattr(self.operands, "with_bias"):
            return self.product(x, self.operands) + self.bias
        return bias_gradient(self.product(x, self.operands.with_bias(self.bias)), self.bias)

    def product(self, x, operands):
        return slope_linear(x, self.weight, operands)

    def refresh(self) -> None:
        self.operands.refresh(self.weight.detach())


class Cutlass(Sparse):
    """The same by our own kernels alone. Choices are one table: time this mode and `paper` in runs of their own."""

    backend = "cutlass"


class WithAdapters(Sparse):
    """And with low-rank adapters of some rank."""

    def __init__(self, rows: int, columns: int, bias: bool, *, rank: int):
        super().__init__(rows, columns, bias)
        self.adapter_l = torch.nn.Parameter(torch.randn(rank, columns, device="cuda", dtype=DTYPE))
        self.adapter_r = torch.nn.Parameter(torch.randn(rows, rank, device="cuda", dtype=DTYPE) * 0.02)

    def product(self, x, operands):
        return slope_linear(x, self.weight, operands, adapters=(self.adapter_l, self.adapter_r))


def fixed_rng(rows: int) -> MvueRng:
    """Random words for a gradient of so many outputs; the same every time."""
    key, streams = as_int32([1, 2]), stream_table([(3, 4)], [range(rows)])
    return MvueRng(key.cuda(), streams.cuda(), 2, 4)


class Full(Sparse):
    """In `full` mode: wgrad reads the unbiased 2:4 estimate of dY."""

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__(rows, columns, bias)
        self.rng = fixed_rng(rows)

    def product(self, x, operands):
        return slope_linear(x, self.weight, operands, rng=self.rng)


class DenseFloat8(Dense):
    """Y = X W^T (+ b), all three products in e4m3; the weight is rounded once a step, as the sparse operands are."""

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__(rows, columns, bias)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        self.rounded = quantize(self.weight.detach(), True, True)

    def forward(self, x):
        if self.bias is None:
            return DenseFloat8Function.apply(x, self.weight, self.rounded, None)
        y = DenseFloat8Function.apply(x, self.weight, self.rounded, self.bias.detach())
        return bias_gradient(y, self.bias)


class SparseFloat8(Sparse):
    """The same with all three products in e4m3."""

    float8_kinds = ("forward", "dgrad", "wgrad")


class SparseFloat8Wgrad16(Sparse):
    """The same with forward and dgrad in e4m3, wgrad in bf16."""

    float8_kinds = ("forward", "dgrad")


# What `slope bench block --modes` and its kin take; dense is measured beside them always.
MODES: dict[str, type] = {
    "dense": Dense,
    "paper": Sparse,
    "full": Full,
    "cutlass": Cutlass,
    "fp8": SparseFloat8,
    "fp8-wgrad16": SparseFloat8Wgrad16,
    "dense-fp8": DenseFloat8,
}
E4M3_MODES = ("fp8", "fp8-wgrad16", "dense-fp8")
# The products that a mode may run sparse, as `ops.choices` names them.
SPARSE_PRODUCTS = {
    "paper": ("forward", "dgrad"),
    "full": ("forward", "dgrad", "wgrad"),
    "cutlass": ("forward", "dgrad"),
}
