"""Losses of whole logits, one pass forward and one backward; `layers.linear_cross_entropy` never has them whole.

T tokens, V entries of the vocabulary; y the labels, g the gradient of the losses.

    forward   loss_T = n_T - z[y],   n_T = log sum exp(z_TV)
    dgrad     dz_TV = (exp(z - n) - [y]) g_T

The logits are kept as they are: no fp32 copy of them is made.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from slope_megatron.ops.custom_ops.cross_entropy import label_statistics, logit_gradient


class TokenLosses(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """Losses `[T]`, in fp32 at least."""
        normalizer_T, chosen_T = label_statistics(logits_TV, labels_T)
        ctx.save_for_backward(logits_TV, labels_T, normalizer_T)
        return normalizer_T - chosen_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor):
        return logit_gradient(*ctx.saved_tensors, gradients[0]), None


def token_losses(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label] `[T]`."""
    return TokenLosses.apply(logits_TV, labels_T)
