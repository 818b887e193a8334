"""Rotary positions of queries and keys, one kernel each on a GPU.

s positions, d width of a head. Position p rotates pair i of a head, its elements i and i + d/2, by the
angle p base^(-2i/d):

    (x1, x2) -> (x1 cos - x2 sin,  x2 cos + x1 sin)

Angles are fp32, their cosines and sines of the head's own type: as Megatron, whose unfused form takes six kernels.
"""

import functools

import torch

from slope_megatron.layers.fused import fused


@functools.cache  # a CUDA graph reads them where they lie: none is ever given back
def tables(positions: int, width: int, base: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cosines and sines `[s, 1, 1, d/2]`; the same in every layer."""
    # They are kept, and no later backward takes inference tensors.
    with torch.inference_mode(False):
        speeds = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), speeds)[:, None, None, :]
        return angles.cos().to(dtype), angles.sin().to(dtype)


@fused
def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def apply_rope(x: torch.Tensor, base: int) -> torch.Tensor:
    """`x` `[s, b, heads, d]` rotated by the positions 0..s-1."""
    return rotate_halves(x, *tables(x.shape[0], x.shape[-1], base, x.device, x.dtype))
