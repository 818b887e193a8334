"""FusedMlp: Megatron's MLP with bias and activation as one kernel, for every activation.

    Y = f(X W1^T + b1) W2^T (+ b2, added with the residual);   gated: f(gate) * up with (gate, up) = X W1^T + b1

Megatron's own fusion covers GELU and SwiGLU, not OPT's ReLU.
"""

import torch
from megatron.core.transformer.mlp import MLP

from slope_megatron.layers.activation import activate


class FusedMlp(MLP):
    """Megatron's `MLP` with another forward; experts, whose tokens have scales of their own, are not for this class."""

    def forward(self, hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[s, b, h]` -> the output and the bias that is still to be added."""
        hidden, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(activate(hidden, bias, self.activation_func, self.config.gated_linear_unit))


def fuse_mlps(model: torch.nn.Module) -> None:
    """Make a built model's MLPs fused. Not by the spec: Megatron's layer gives its process group to `MLP` alone."""
    for module in model.modules():
        if type(module) is MLP:
            module.__class__ = FusedMlp
