"""Words by index: each output asks for its own, whoever holds it, and the table is what a kernel reads."""

import pytest
import torch

from slope_megatron.sparsity import counter
from slope_megatron.sparsity.mvue_rng import ROUNDS, MvueRng, as_int32, stream_table

NAMES = [(0xFFFFFFFF, 1), (2, 0x80000000)]


def rng_of(names, rows, key=(0xDEADBEEF, 3)):
    return MvueRng(as_int32(key), stream_table(names, rows), 2, 4)


def test_the_table_lists_even_outputs_then_odd_ones():
    table = stream_table(NAMES, [range(10, 14), range(20, 22)])
    assert table.dtype == torch.int32 and table.shape == (3, 2, 3)
    assert table[2].tolist() == [[10, 12, 20], [11, 13, 21]]
    assert (table[:2].long() & counter.MASK32).tolist() == [
        [[0xFFFFFFFF, 0xFFFFFFFF, 2], [0xFFFFFFFF, 0xFFFFFFFF, 2]],
        [[1, 1, 0x80000000], [1, 1, 0x80000000]],
    ]


@pytest.mark.parametrize("groups", [8, 7])
def test_a_word_is_that_of_its_row_in_the_whole_weight(groups):
    words = rng_of(NAMES, [range(10, 14), range(20, 22)]).words(groups)
    indices = [(NAMES[0], row) for row in range(10, 14)] + [(NAMES[1], row) for row in range(20, 22)]
    for found, (name, row) in zip(words, indices, strict=True):
        index = row * groups + torch.arange(groups)
        blocks = counter.philox((0xDEADBEEF, 3), index // 4, name, ROUNDS)
        assert torch.equal(found, blocks[torch.arange(groups), index % 4])


def test_shards_draw_what_the_whole_draws():
    dy = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    whole = rng_of(NAMES, [range(8), range(8)]).estimate(dy)
    halves = [rng_of(NAMES, [range(start, start + 4)] * 2) for start in (0, 4)]
    parts = [
        half.estimate(torch.cat((dy[:, first : first + 4], dy[:, 8 + first : 12 + first]), 1))
        for half, first in zip(halves, (0, 4), strict=True)
    ]
    assert torch.equal(torch.cat([part[:, :4] for part in parts], 1), whole[:, :8])
    assert torch.equal(torch.cat([part[:, 4:] for part in parts], 1), whole[:, 8:])
