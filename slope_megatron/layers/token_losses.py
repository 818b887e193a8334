"""Losses of whole logits, one pass forward and one backward; `layers.linear_cross_entropy` never has them whole.

T tokens, V entries of the vocabulary on this rank; y the labels, g the gradient of the losses, c the coefficient of a
z-loss, c n_T^2 a token: its gradient joins that of the losses, whose values stay without it.

    forward   loss_T = n_T - z[y],   n_T = log sum exp(z_TV), over all ranks' V
    dgrad     dz_TV = ((1 + 2 c n_T) exp(z - n) - [y]) g_T

The logits are kept as they are: no fp32 copy of them is made.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from slope_megatron.layers.linear_cross_entropy import over_ranks
from slope_megatron.ops.custom_ops.cross_entropy import label_statistics, logit_gradient


class TokenLosses(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor, z_loss: float, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """Losses `[T]`, in fp32 at least; `group`: the ranks that share the vocabulary, None: it is whole here."""
        if group is not None and group.size() == 1:
            group = None
        if group is not None:
            labels_T = labels_T - group.rank() * logits_TV.shape[1]
        normalizer_T, chosen_T = label_statistics(logits_TV, labels_T)
        if group is not None:
            normalizer_T, chosen_T = over_ranks(normalizer_T, chosen_T, group)
        ctx.save_for_backward(logits_TV, labels_T, normalizer_T)
        ctx.z_loss = z_loss
        return normalizer_T - chosen_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor):
        return logit_gradient(*ctx.saved_tensors, gradients[0], ctx.z_loss), None, None, None


def token_losses(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, z_loss: float = 0.0, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """-log softmax(logits)[label] `[T]`; arguments as `TokenLosses.forward`'s."""
    return TokenLosses.apply(logits_TV, labels_T, z_loss, group)
