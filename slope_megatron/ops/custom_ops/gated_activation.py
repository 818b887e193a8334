"""The registered op of a gated activation's gradient; see `custom_ops.products` for what that means.

T tokens, F width of the MLP, G = 2F; x [T, G] + b = [gate | up], Y [T, F] = f(gate) up.
    slope::gated_activation_gradient   dX [T, G] = [dY up f'(gate) | dY f(gate)]
On CUDA it runs `slope_kernels`; on a CPU plain torch.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

# name: f, and the product of a gradient with f'.
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (functional.silu, torch.ops.aten.silu_backward),
    "gelu": (functional.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        functools.partial(functional.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


def name_of(activation: Callable) -> str | None:
    """Its name in ACTIVATIONS; None: it is none of them."""

    def described(function):
        # Two partial functions of the same are not equal.
        return getattr(function, "func", function), getattr(function, "args", ()), getattr(function, "keywords", {})

    same = (name for name, (known, _) in ACTIVATIONS.items() if described(known) == described(activation))
    return next(same, None)


@torch.library.custom_op("slope::gated_activation_gradient", mutates_args=(), device_types="cuda")
def gradient(dy_TF: torch.Tensor, x_TG: torch.Tensor, bias_G: torch.Tensor | None, activation: str) -> torch.Tensor:
    """dX `[T, G]` of x's type; computed in fp32 and rounded once.

    Args:
        activation: one of ACTIVATIONS.
    """
    from slope_kernels.triton import gated_activation

    dx_TG = torch.empty_like(x_TG, memory_format=torch.contiguous_format)
    bias_G = None if bias_G is None else bias_G.contiguous()
    gated_activation.gradient(dy_TF.contiguous(), x_TG.contiguous(), bias_G, dx_TG, activation)
    return dx_TG


@gradient.register_kernel("cpu")
def _(dy_TF, x_TG, bias_G, activation):
    function, derivative = ACTIVATIONS[activation]
    wide = torch.promote_types(x_TG.dtype, torch.float32)
    gate, up = (x_TG.to(wide) if bias_G is None else x_TG.to(wide) + bias_G).chunk(2, -1)
    dy_TF = dy_TF.to(wide)
    return torch.cat((derivative(dy_TF * up, gate), dy_TF * function(gate)), -1).to(x_TG.dtype)


@gradient.register_fake
def _(dy_TF, x_TG, bias_G, activation):
    return torch.empty_like(x_TG, memory_format=torch.contiguous_format)
