"""S-STE's continuous 2:4 pruning (arXiv 2409.09099), and what a masked weight is multiplied as.

N out, K in. t is the second smallest |w| of each group of 4 along K, b a number for each weight that is chosen once:

    S(W) = sign(W) max(|W| - t, 0)        two of four are zero; no jump where two weights change places
    b    = <W, S(W)> / <S(W), S(W)>       least |W - b S(W)|^2
"""

from collections.abc import Container

import torch

from slope_megatron.sparsity.packing import unpack_bits

# In a checkpoint, what `as_multiplied` takes besides a weight lies under these names beside it.
BESIDE = (".weight_mask", ".weight_scale")


def soft_threshold(weight_NK: torch.Tensor) -> torch.Tensor:
    """S(W), fp32 `[N, K]` (fp64 of fp64); a group with a NaN is NaN."""
    weight = weight_NK.to(torch.promote_types(weight_NK.dtype, torch.float32))
    first, second, third, fourth = weight.abs().unflatten(-1, (-1, 4)).unbind(-1)
    larger = torch.maximum(torch.minimum(first, second), torch.minimum(third, fourth))
    threshold = torch.minimum(larger, torch.minimum(torch.maximum(first, second), torch.maximum(third, fourth)))
    excess = weight.abs().unflatten(-1, (-1, 4)) - threshold[..., None]
    return torch.copysign(excess.clamp(min=0.0), weight.unflatten(-1, (-1, 4))).flatten(-2)


def scale_sums(weight_NK: torch.Tensor) -> torch.Tensor:
    """<W, S(W)> and <S(W), S(W)>, fp64 `[2]`: shards of one weight add theirs up."""
    pruned = soft_threshold(weight_NK).double()
    return torch.stack(((weight_NK.double() * pruned).sum(), (pruned * pruned).sum()))


def scale_of(sums: torch.Tensor) -> torch.Tensor:
    """b, fp32 `[1]`; 1 of a weight of which nothing is left."""
    product, square = sums[:1], sums[1:]
    return torch.where(square > 0, product / square, torch.ones_like(square)).float()


def as_multiplied(
    weight_NK: torch.Tensor, mask_bits: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """W; S W of a bitmask uint8 `[N, K/8]`; with S-STE's scale b S(W), rounded once. In the weight's type."""
    if scale is not None:
        return (scale * soft_threshold(weight_NK)).to(weight_NK.dtype)
    return weight_NK if mask_bits is None else weight_NK * unpack_bits(mask_bits)


def arguments(name: str, stored: Container[str]) -> list[str]:
    """A tensor's name and those, of what is stored, of its other arguments of `as_multiplied`."""
    beside = (name.removesuffix(".weight") + suffix for suffix in BESIDE if name.endswith(".weight"))
    return [name, *(other for other in beside if other in stored)]
