"""CUTLASS's order of metadata: address by address, back and forth, and from the other order."""

import pytest
import torch

from slope_megatron.sparsity.operand import metadata_sm90, slot_indices
from slope_megatron.sparsity.operand_cutlass import from_sm90, indices_cutlass, metadata_cutlass
from slope_megatron.sparsity.pattern import random_pattern

# The lowest address bit first, of a nibble in its block of 64 rows (r) x 16 groups (g).
ADDRESS = ["g0", "g1", "r3", "g3", "r0", "r1", "r2", "g2", "r4", "r5"]
SHAPES = [(64, 128), (192, 288), (128, 64), (64, 1024)]


def indices_of(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return slot_indices(random_pattern(torch.randint(0, 1 << 30, (rows, columns), generator=generator), 2, 4))


def address(row: int, group: int, rows: int) -> int:
    """The number of a group's nibble, bit by bit."""
    block = (group // 16) * (rows // 64) + row // 64
    bits = [(row if name[0] == "r" else group) >> int(name[1]) & 1 for name in ADDRESS]
    return block * 1024 + sum(bit << shift for shift, bit in enumerate(bits))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_each_nibble_is_at_its_address(rows, columns):
    indices = indices_of(rows, columns)
    metadata = metadata_cutlass(indices)
    assert metadata.numel() == rows * (columns + -columns % 64) // 8
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).flatten()
    expected = torch.zeros_like(nibbles)
    for row in range(rows):
        for group in range(columns // 4):
            first, second = indices[row, group].tolist()
            expected[address(row, group, rows)] = first | second << 2
    assert torch.equal(nibbles, expected)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_indices_come_back(rows, columns):
    indices = indices_of(rows, columns)
    assert torch.equal(indices_cutlass(metadata_cutlass(indices), rows, columns // 4), indices)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_other_library_s_metadata_is_put_in_order(rows, columns):
    indices = indices_of(rows, columns)
    assert torch.equal(from_sm90(metadata_sm90(indices), rows, columns // 4), metadata_cutlass(indices))
