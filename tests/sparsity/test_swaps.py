"""Swaps within groups, against loops over groups."""

import math

import pytest
import torch

from slope_megatron.sparsity import swaps
from slope_megatron.sparsity.pattern import magnitude_pattern


def by_loops(weight, mask, gradient, m, count, rule):
    """(dropped, grown) of each swap, best first: one group after the other, in Python."""
    found = []
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            places = range(start, start + m)
            kept = min((p for p in places if mask[row, p]), key=lambda p: abs(float(weight[row, p])))
            new = max((p for p in places if not mask[row, p]), key=lambda p: abs(float(gradient[row, p])))
            score = abs(float(gradient[row, new])) if rule == "gradient" else -abs(float(weight[row, kept]))
            found.append((score, row * weight.shape[1] + kept, row * weight.shape[1] + new))
    found.sort(key=lambda swap: -swap[0])  # stable: the earlier group
    return [swap[1:] for swap in found[:count]]


def pieces(m=4, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: many ties.
    weight, gradient = (torch.randint(-9, 10, (6, 32), generator=generator).float() for _ in range(2))
    return weight, magnitude_pattern(torch.rand(6, 32, generator=generator), n, m), gradient


@pytest.mark.parametrize("rule", ["gradient", "magnitude"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (2, 8)])
def test_the_weakest_makes_room_for_the_most_wanted(rule, n, m):
    weight, mask, gradient = pieces(m, n)
    groups = weight.numel() // m
    for share in (0.0, 0.1, 0.3, 1.0):
        found = swaps.choose_swaps(weight, mask, gradient, m, share, rule, torch.Generator())
        expected = by_loops(weight, mask, gradient, m, round(share * groups), rule)
        assert list(zip(found.dropped.tolist(), found.grown.tolist(), strict=True)) == expected
        after = swaps.swap_mask(mask, found)
        assert (after.unflatten(-1, (-1, m)).sum(-1) == n).all()
        assert int((after != mask).sum()) == 2 * len(expected)


def test_random_groups_grow_at_random():
    weight, mask, gradient = pieces()
    draws = [
        swaps.choose_swaps(weight, mask, gradient, 4, 0.25, "random", torch.Generator().manual_seed(seed))
        for seed in range(400)
    ]
    again = swaps.choose_swaps(weight, mask, gradient, 4, 0.25, "random", torch.Generator().manual_seed(0))
    assert torch.equal(draws[0].grown, again.grown)
    grown = torch.bincount(torch.cat([one.grown for one in draws]), minlength=weight.numel()).double()
    pruned = ~mask.flatten()
    assert not grown[mask.flatten()].any()
    # Each of two pruned places in a quarter of the draws' groups: 50 of 400, of a standard deviation of 6.6.
    assert (grown[pruned] - 50).abs().max() < 4.5 * 6.6
    for one in draws:
        assert torch.equal(one.dropped // 4, one.grown // 4) and len(set((one.grown // 4).tolist())) == 12


def test_the_share_falls_to_nothing():
    assert swaps.share_at(0, 100, 0.3) == 0.3
    assert swaps.share_at(25, 100, 0.3) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert swaps.share_at(74, 100, 0.3) > 0.0 == swaps.share_at(75, 100, 0.3) == swaps.share_at(99, 100, 0.3)


def test_what_grows_starts_at_zero_with_the_others_second_moment():
    masters, first, second = (torch.arange(1.0, 9.0) * scale for scale in (1, 10, 100))
    swaps.swap_state(swaps.Swaps(torch.tensor([1, 6]), torch.tensor([0, 7])), masters, first, second)
    assert masters.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]
    assert first.tolist() == [0, 0, 30, 40, 50, 60, 0, 0]
    assert second.tolist() == [200, 0, 300, 400, 500, 600, 0, 700]
