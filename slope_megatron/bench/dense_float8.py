"""The dense baseline of the e4m3 linears: all three products by torch's own fp8 matrix product, with the same rounding.

T tokens, N out, K in; q(.) rounds to e4m3 with one scale a tensor.
    forward Y = q(X) q(W)^T (+ b),   dgrad dX = q(dY) q(W),   wgrad dW = q(dY)^T q(X)
The weight is rounded once a step, in both orders, as the sparse operands are.
"""

import torch

from slope_megatron.ops.custom_ops.float8 import dense_mm, quantize


class DenseFloat8Function(torch.autograd.Function):
    """See the file's docstring; `weight` enters so that autograd hands it its gradient."""

    @staticmethod
    def forward(ctx, x_TK, weight_NK, rounded, bias_N):
        w_NK, _, w_scale = rounded
        ctx.save_for_backward(x_TK)
        ctx.rounded = rounded
        q_TK, _, scale = quantize(x_TK, True, False)
        return dense_mm(q_TK, w_NK, scale, w_scale, bias_N, x_TK.dtype)

    @staticmethod
    def backward(ctx, dy_TN):
        (x_TK,) = ctx.saved_tensors
        _, w_KN, w_scale = ctx.rounded
        q_TN, q_NT, dy_scale = quantize(dy_TN, True, True)
        dx_TK = dense_mm(q_TN, w_KN, dy_scale, w_scale, None, dy_TN.dtype)
        _, q_KT, x_scale = quantize(x_TK, False, True)
        dw_NK = dense_mm(q_NT, q_KT, dy_scale, x_scale, None, dy_TN.dtype)
        return dx_TK, dw_NK, None, None
