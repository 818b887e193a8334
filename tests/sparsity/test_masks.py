"""The baselines' masks against oracles that try everything."""

import itertools

import torch

from slope_megatron.sparsity.tokens import largest_along_tokens
from slope_megatron.sparsity.transposable import patterns, transposable_mask
from slope_megatron.sparsity.wanda import squared_norms, wanda_mask


def all_blocks():
    """Every 4 x 4 block of zeros and ones with two ones in each row and column, out of all 65,536."""
    for bits in itertools.product(range(16), repeat=4):
        rows = [[value >> i & 1 for i in range(4)] for value in bits]
        if all(sum(row) == 2 for row in rows) and all(sum(column) == 2 for column in zip(*rows, strict=True)):
            yield torch.tensor(rows, dtype=torch.float64)


def test_there_are_ninety_transposable_blocks():
    blocks = torch.stack(list(all_blocks()))
    assert len(blocks) == 90 == len(patterns())
    assert {tuple(row) for row in blocks.flatten(1).tolist()} == {tuple(row) for row in patterns().tolist()}


def test_the_transposable_mask_keeps_the_most_magnitude():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    weight[:4, :4] = 1.0  # ties
    weight[4:8, :4] = 0.0
    mask = transposable_mask(weight)
    blocks = torch.stack(list(all_blocks()))
    for top, left in itertools.product(range(0, 16, 4), range(0, 24, 4)):
        part, kept = weight[top : top + 4, left : left + 4].abs().double(), mask[top : top + 4, left : left + 4]
        assert (kept.sum(0) == 2).all() and (kept.sum(1) == 2).all()
        assert float((part * kept).sum()) == float((blocks * part).sum((1, 2)).max())
    assert torch.equal(mask[4:, 8:], transposable_mask(weight[4:, 8:])), "a shard finds the mask of the whole"


def test_the_largest_tokens_are_kept():
    dy = torch.randn(10, 5, generator=torch.Generator().manual_seed(2))
    found = largest_along_tokens(dy, 2, 4)
    for column, first in itertools.product(range(5), (0, 4, 8)):
        group = dy[first : first + 4, column]
        expected = group.clone()
        expected[group.abs().argsort(descending=True)[2:]] = 0.0
        assert torch.equal(found[first : first + 4, column], expected)


def test_wanda_keeps_by_weight_times_input_norm():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 16, generator=generator)
    x = torch.randn(40, 16, generator=generator) * torch.rand(16, generator=generator) * 5
    mask = wanda_mask(weight, squared_norms(x[:15]) + squared_norms(x[15:]), 2, 4)
    for row, first in itertools.product(range(6), range(0, 16, 4)):
        score = [float(weight[row, j].abs().double() * x[:, j].double().norm()) for j in range(first, first + 4)]
        best = sorted(range(4), key=lambda j: -score[j])[:2]
        assert mask[row, first : first + 4].nonzero().flatten().tolist() == sorted(best)
    assert not torch.equal(mask, wanda_mask(weight, torch.ones(16), 2, 4)), "the inputs must matter"
