"""Bias and activation of an MLP, one kernel forward and one backward on a GPU; elsewhere plain torch.

    plain   y = f(x + b)
    gated   y_TF = f(gate) * up,   x_TG + b_G = [gate | up],   G = 2F
            dgrad   dx_TG = [dy up f'(gate) | dy f(gate)];   db_G = sum_T dx

torch.compile writes the gated dgrad's two halves as two masked branches, each of which reads everything: it takes twice
as long as the bytes do. So backward is a kernel of our own there. Either way x and b alone are kept for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from slope_megatron.layers.fused import fused
from slope_megatron.ops.custom_ops.gated_activation import gradient, name_of
from slope_megatron.ops.custom_ops.products import has_kernels


def activate(x: torch.Tensor, bias: torch.Tensor | None, activation: Callable, gated: bool) -> torch.Tensor:
    """f(x + b) of x `[..., F]`; gated, of x `[..., 2F]`: f(gate) * up, `[..., F]`."""
    # Within a compiled region the compiler sees through the plain form.
    name = name_of(activation) if gated and has_kernels(x) and not torch.compiler.is_compiling() else None
    if name is None:
        return fused_activation(x, bias, activation, gated)
    return GatedActivation.apply(x, bias, activation, name)


@fused
def fused_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: Callable, gated: bool) -> torch.Tensor:
    if bias is not None:
        x = x + bias
    if not gated:
        return activation(x)
    gate, up = x.chunk(2, dim=-1)
    return activation(gate) * up


class GatedActivation(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, activation: Callable, name: str) -> torch.Tensor:
        """y `[..., F]` of x `[..., 2F]`; `name`: the activation's for the gradient's kernel."""
        ctx.save_for_backward(x, bias)
        ctx.name = name
        return fused_activation(x, bias, activation, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor):
        x, bias = ctx.saved_tensors
        dx = gradient(gradients[0].flatten(0, -2), x.flatten(0, -2), bias, ctx.name)
        # Kernels of torch sum bf16 numbers up in fp32.
        db = dx.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[1] else None
        return dx.view(x.shape), db, None, None
