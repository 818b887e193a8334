"""CUTLASS's order of metadata for 16-bit types on sm_90, in plain torch; the nibbles are those of `operand`.

R rows, G groups of four a row. Blocks of 64 rows x 16 groups (512 bytes), one row block after the other within 16
groups; missing groups of the last block are zero. Within a block the nibble's address is, from the highest bit,
r5 r4 g2 r2 r1 r0 g3 r3 g1 g0: `Sm90GemmSparseConfig::TensorEAtom_16bit` for tiles of 64 columns, as our
kernels have.
"""

import torch

BLOCK_GROUPS = 16


def metadata_cutlass(indices: torch.Tensor) -> torch.Tensor:
    """Metadata uint8 from indices `[R, G, 2]`; R a multiple of 64."""
    rows, groups, _ = indices.shape
    nibble = (indices[..., 0] | indices[..., 1] << 2).to(torch.uint8)
    nibble = torch.nn.functional.pad(nibble, (0, -groups % BLOCK_GROUPS))
    # Axes: row block, r54, r3, r210, group block, g3, g2, g10.
    bits = nibble.view(rows // 64, 4, 2, 8, -1, BLOCK_GROUPS // 8, 2, 4)
    ordered = bits.permute(4, 0, 1, 6, 3, 5, 2, 7).reshape(-1, 2)
    return ordered[:, 0] | ordered[:, 1] << 4


def indices_cutlass(metadata: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `metadata_cutlass`: indices int64 `[rows, groups, 2]`."""
    nibble = torch.stack((metadata & 15, metadata >> 4), -1)
    bits = nibble.view(-1, rows // 64, 4, 2, 8, BLOCK_GROUPS // 8, 2, 4)
    ordered = bits.permute(1, 2, 6, 4, 0, 5, 3, 7).reshape(rows, -1)[:, :groups].long()
    return torch.stack((ordered & 3, ordered >> 2), -1)


def from_sm90(metadata: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The same metadata in CUTLASS's order, from `operand.metadata_sm90`'s; G a multiple of 8."""
    nibble = torch.stack((metadata & 15, metadata >> 4), -1)
    # Axes of that order: row block, group block of 8, r54, r210, g10, g2, r3.
    eights = BLOCK_GROUPS // 8
    bits = nibble.view(rows // 64, groups // 8, 4, 8, 4, 2, 2)
    bits = torch.nn.functional.pad(bits, (0,) * 11 + (-(groups // 8) % eights,))
    bits = bits.view(rows // 64, -1, eights, 4, 8, 2, 2, 2, 2)
    # Axes now: row block, group block of 16, g3, r54, r210, g1, g0, g2, r3.
    ordered = bits.permute(1, 0, 3, 7, 4, 2, 8, 5, 6).reshape(-1, 2)
    return ordered[:, 0] | ordered[:, 1] << 4
