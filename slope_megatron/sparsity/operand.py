"""What sparse tensor cores read, in plain torch: the oracle of every kernel that writes an operand.

N out, K in, C = K/2 kept per row; 2:4 along both axes. An operand of R rows keeps two *slots* for every four weights of
a row: a value and its index (0..3) within the four, the two indices of a group different and ascending.

    forward operand    W^R [N, K]: the packed values themselves, the indices those of the row pattern
    backward operand   W^{R,C} transposed [K, N]: a column group keeps at most two; a slot without a survivor holds zero

Metadata is one nibble a group, first index | second index << 2, in the order that a library wants; the orders here are
cuSPARSELt's on sm_90, one for 16-bit types and one for e4m3.
"""

import torch

from slope_megatron.sparsity.packing import unpack


def slot_indices(alive: torch.Tensor) -> torch.Tensor:
    """Places of the two slots of each group of four: int64 `[..., G, 2]`, ascending.

    Args:
        alive: bool `[..., 4 G]`, at most two True in each group. With fewer, the other slot takes index 0, or 1 where 0
            is taken.
    """
    groups = alive.unflatten(-1, (-1, 4))
    position = torch.arange(4, device=alive.device)
    last = torch.where(groups, position, torch.ones_like(position)).amax(-1)
    first = torch.where(groups, position, torch.full_like(position, 4)).amin(-1)
    first = torch.where(groups.sum(-1) == 2, first, torch.zeros_like(first))
    return torch.stack((first, last), -1)


def slots(dense: torch.Tensor, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[R, S/2]` and indices int64 `[R, S/4, 2]` of an operand.

    Args:
        dense: `[R, S]`; read only where `alive`, bool of the same shape, is True.
    """
    indices = slot_indices(alive)
    kept = torch.where(alive, dense, torch.zeros_like(dense)).unflatten(-1, (-1, 4))
    return kept.gather(-1, indices).flatten(-2), indices


def backward_slots(values_NC, row_NK, column_NC) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of the transposed W^{R,C}; `column_NC` bool `[N, C]` says which kept values survive."""
    dense = unpack(values_NC * column_NC, row_NK)
    alive = unpack(column_NC, row_NK)
    return slots(dense.t().contiguous(), alive.t().contiguous())


def metadata_sm90(indices: torch.Tensor) -> torch.Tensor:
    """cuSPARSELt's metadata on sm_90, uint8 `[R G / 2]`, from indices `[R, G, 2]`; R a multiple of 64, G of 8.

    Blocks of 64 rows x 8 groups, group-major within a row block; within one the nibble's address is, from the highest
    bit, r5 r4 r2 r1 r0 g1 g0 g2 r3.
    """
    rows, groups, _ = indices.shape
    nibble = (indices[..., 0] | indices[..., 1] << 2).to(torch.uint8)
    # Axes: row block, r54, r3, r210, group block, g2, g1, g0.
    bits = nibble.view(rows // 64, 4, 2, 8, groups // 8, 2, 2, 2)
    ordered = bits.permute(0, 4, 1, 3, 6, 7, 5, 2).reshape(-1, 2)
    return ordered[:, 0] | ordered[:, 1] << 4


def indices_sm90(metadata: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `metadata_sm90`: indices int64 `[rows, groups, 2]`."""
    nibble = torch.stack((metadata & 15, metadata >> 4), -1)
    bits = nibble.view(rows // 64, groups // 8, 4, 8, 2, 2, 2, 2)
    ordered = bits.permute(0, 2, 7, 3, 1, 6, 4, 5).reshape(rows, groups).long()
    return torch.stack((ordered & 3, ordered >> 2), -1)


def metadata_e4m3(metadata: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """cuSPARSELt's metadata of an e4m3 operand on sm_90 from that of a 16-bit one; G a multiple of 16.

    Blocks of 64 rows x 16 groups, group-major within a row block; within one the nibble's address is, from the highest
    bit, r5 r4 r2 r1 r0 g2 g1 g3 r3 g0.
    """
    nibble = torch.stack((metadata & 15, metadata >> 4), -1)
    # Axes: row block, group block, g3, r54, r210, g1, g0, g2, r3.
    bits = nibble.view(rows // 64, groups // 16, 2, 4, 8, 2, 2, 2, 2)
    ordered = bits.permute(0, 1, 3, 4, 7, 5, 2, 8, 6).reshape(-1, 2)
    return ordered[:, 0] | ordered[:, 1] << 4


def indices_e4m3(metadata: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The indices int64 `[rows, groups, 2]` that e4m3 metadata stands for."""
    nibble = torch.stack((metadata & 15, metadata >> 4), -1)
    bits = nibble.view(rows // 64, groups // 16, 4, 8, 2, 2, 2, 2, 2)
    ordered = bits.permute(0, 2, 7, 3, 1, 6, 4, 5, 8).reshape(rows, groups).long()
    return torch.stack((ordered & 3, ordered >> 2), -1)


def scatter_slots(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The dense matrix `[R, S]` that slots stand for: what a sparse product multiplies with."""
    if values.dtype == torch.float8_e4m3fn:  # torch does not scatter these; a zero byte is their zero
        return scatter_slots(values.view(torch.uint8), indices).view(values.dtype)
    groups = values.unflatten(-1, (-1, 2))
    dense = torch.zeros((*groups.shape[:-1], 4), dtype=values.dtype, device=values.device)
    return dense.scatter(-1, indices, groups).flatten(-2)
