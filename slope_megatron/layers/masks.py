"""Masks of the baselines, chosen and applied: one kernel each on a GPU, as `layers.fused` makes them.

N out, K in, T tokens. The mathematics is that of `slope_megatron.sparsity`, to the bit; but a GPU adds the decay in one
rounding, plain torch in two.
"""

import torch

from slope_megatron.layers.fused import fused
from slope_megatron.sparsity import tokens
from slope_megatron.sparsity.packing import pack_bits, unpack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern
from slope_megatron.sparsity.soft_threshold import as_multiplied

largest_along_tokens = fused(tokens.largest_along_tokens)


@fused
def magnitude_bits(weight_NK: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The n largest of every m weights of a row: a bitmask uint8 `[N, K/8]`."""
    return pack_bits(magnitude_pattern(weight_NK, n, m))


@fused
def mask_into(
    out_NK: torch.Tensor, weight_NK: torch.Tensor, mask_bits: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """`out` = S W, S a bitmask uint8 `[N, K/8]`; with S-STE's scale b S(W)."""
    return out_NK.copy_(as_multiplied(weight_NK, mask_bits, scale))


@fused
def add_decay_(
    gradient: torch.Tensor, weight: torch.Tensor, mask_bits: torch.Tensor, start: int, decay: float
) -> torch.Tensor:
    """gradient += decay (1 - S) W, for the weights from number `start` of the flattened matrix on.

    Args:
        gradient, weight: flat, of one length.
    """
    pruned = ~unpack_bits(mask_bits).flatten()[start : start + weight.numel()]
    return gradient.add_(weight * pruned, alpha=decay)
