"""Working through a matrix in pieces: whole groups, and the same result whatever their size."""

import pytest
import torch

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.packed_weight import PackedWeight, Region
from slope_megatron.ops.backend import choose_column_bits
from slope_megatron.sparsity import pieces


@pytest.mark.parametrize("columns", [1, 64, 9216, 10**6])
def test_pieces_are_whole_groups_and_cover_the_rows_once(columns):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pieces.rows_at_once(columns, cpu) % 8 == 0 and pieces.rows_at_once(columns, gpu) == 4096
    found = list(pieces.pieces(range(16, 5000), columns, cpu))
    assert [row for piece in found for row in piece] == list(range(16, 5000))
    assert all(len(piece) == pieces.rows_at_once(columns, cpu) for piece in found[:-1])
    assert max(map(len, found)) * columns <= max(8 * columns, pieces.ELEMENTS_ON_CPU)


def test_the_second_pruning_does_not_depend_on_the_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(64, 32, generator=generator)
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)
    drawn = nibbles[torch.randint(6, (2, 64, 8), generator=generator)]
    row_bits = drawn[0] | drawn[1] << 4
    whole = choose_column_bits(values, row_bits, 2, 4)
    monkeypatch.setattr(pieces, "ELEMENTS_ON_CPU", 1)
    assert torch.equal(choose_column_bits(values, row_bits, 2, 4), whole)


class Weight(PackedWeight):
    """A linear's packed weight without the linear: `init_weight` needs neither ranks nor Megatron's constructor."""

    def __init__(self, rows: int, columns: int, slope: SlopeConfig):
        torch.nn.Module.__init__(self)
        self.slope = slope
        self.weight = torch.nn.Parameter(torch.zeros(rows, columns // 2, dtype=torch.bfloat16))
        self.register_buffer("weight_pattern", torch.zeros(rows, columns // 8, dtype=torch.uint8))
        self.register_buffer("weight_column", torch.zeros(rows, columns // 16, dtype=torch.uint8))


@pytest.mark.parametrize("pattern", ["random", "magnitude"])
def test_what_is_drawn_does_not_depend_on_the_pieces(monkeypatch, pattern):
    def drawn():
        weight = Weight(40, 64, SlopeConfig(pattern=pattern))
        weight.init_weight(7, Region("layer", range(40), 3, 0, 64), 0.02)
        return weight.weight.detach(), weight.weight_pattern

    whole = drawn()
    monkeypatch.setattr(pieces, "ELEMENTS_ON_CPU", 1)
    assert all(map(torch.equal, drawn(), whole))
