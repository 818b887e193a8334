"""Gradients of zeros for parameters that an output does not depend on."""

import torch


class ZeroGradients(torch.autograd.Function):
    """Forward Y; dY = dY, and zeros for each parameter."""

    @staticmethod
    def forward(ctx, output, *parameters):
        ctx.save_for_backward(*parameters)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def with_zero_gradients(output: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """`output`, whose backward reaches these parameters too."""
    return ZeroGradients.apply(output, *parameters)
