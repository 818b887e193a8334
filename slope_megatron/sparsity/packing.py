"""The packed layout, defined once.

N out, K in, C = K n/m kept per row.
- values `[N, C]`: the kept weights of each row from left to right;
- row pattern, bitmask uint8 `[N, K/8]`: bit b of byte j says whether weight 8j + b of the row is kept;
- column pattern, bitmask uint8 `[N, C/8]`: bit b of byte j says whether kept value 8j + b survives the second pruning.
"""

import torch


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool `[..., K]` -> uint8 `[..., K/8]`, lowest bit first; K a multiple of 8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    # A sum of distinct powers of two stays under 256, so uint8 holds it.
    return (mask.unflatten(-1, (-1, 8)).to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., K/8]` -> bool `[..., K]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).bool().flatten(-2)


def kept_index(mask: torch.Tensor) -> torch.Tensor:
    """Where the kept weights of each row are: int64 `[N, C]`, ascending. All rows must keep equally many."""
    rows = mask.shape[0]
    return mask.nonzero()[:, 1].view(rows, -1)


def pack(dense: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[N, K]` read at the kept positions -> `[N, C]`."""
    return dense[mask].view(dense.shape[0], -1)


def unpack(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[N, C]` -> `[N, K]` with zeros elsewhere."""
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    dense[mask] = values.flatten()
    return dense
