"""The dense baseline of the e4m3 linears: all three products by torch's own fp8 matrix product, with the same rounding.

T tokens, N out, K in; q(.) rounds to e4m3 with one scale a tensor.
    forward Y = q(X) q(W)^T (+ b),   dgrad dX = q(dY) q(W),   wgrad dW = q(dY)^T q(X)
The weight is rounded once a step, in both orders, as the sparse operands are.
"""

from collections.abc import Iterable

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from slope_megatron.ops.custom_ops.float8 import dense_mm, quantize


class DenseFloat8Function(torch.autograd.Function):
    """See the file's docstring; `weight` enters so that autograd hands it its gradient."""

    @staticmethod
    def forward(ctx, x_TK, weight_NK, rounded, bias_N):
        w_NK, _, w_scale = rounded
        ctx.save_for_backward(x_TK)
        ctx.rounded = rounded
        q_TK, _, scale = quantize(x_TK, True, False)
        # Rounding pads tokens to a multiple of 16.
        return dense_mm(q_TK, w_NK, scale, w_scale, bias_N, x_TK.dtype)[: x_TK.shape[0]]

    @staticmethod
    def backward(ctx, dy_TN):
        (x_TK,) = ctx.saved_tensors
        _, w_KN, w_scale = ctx.rounded
        q_TN, q_NT, dy_scale = quantize(dy_TN, True, True)
        dx_TK = dense_mm(q_TN, w_KN, dy_scale, w_scale, None, dy_TN.dtype)[: x_TK.shape[0]]
        _, q_KT, x_scale = quantize(x_TK, False, True)
        dw_NK = dense_mm(q_NT, q_KT, dy_scale, x_scale, None, dy_TN.dtype)
        return dx_TK, dw_NK, None, None


class Rounded(torch.nn.Module):
    """Mixed into Megatron's linears on one rank: their three products in e4m3.

    Attributes:
        rounded: q(W) `[N, K]`, its transpose, and the scale: the same memory in every step, as CUDA graphs want it.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    skip_bias_add: bool
    rounded: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the present weight."""
        for kept, new in zip(self.rounded, quantize(self.weight.detach(), True, True), strict=True):
            kept.copy_(new)

    def forward(self, x_sbK: torch.Tensor, *_unused):
        """As Megatron's: Y `[s, b, N]`, and the bias where somebody else adds it."""
        bias, kept = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        y_TN = DenseFloat8Function.apply(x_sbK.flatten(0, 1), self.weight, self.rounded, None)
        y_sbN = y_TN.view(*x_sbK.shape[:-1], -1)
        return (y_sbN if bias is None else y_sbN + bias), kept


class RoundedColumn(Rounded, ColumnParallelLinear):
    """See `Rounded`."""


class RoundedRow(Rounded, RowParallelLinear):
    """See `Rounded`."""


def round_linears(linears: Iterable[torch.nn.Module]) -> list[Rounded]:
    """Turn Megatron's linears of an engine of one rank into ones that multiply in e4m3."""
    found: list[Rounded] = []
    for linear in linears:
        linear.__class__ = RoundedColumn if isinstance(linear, ColumnParallelLinear) else RoundedRow
        assert isinstance(linear, Rounded)
        linear.rounded = quantize(linear.weight.detach(), True, True)
        found.append(linear)
    return found
