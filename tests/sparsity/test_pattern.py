"""N:M patterns: exactly n of m, sharding commutes, and the second pruning zeroes what the lemma says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_megatron.sparsity import counter
from slope_megatron.sparsity.pattern import column_pattern, extra_zeros, magnitude_pattern, random_pattern, top_n_of_m

PATTERNS = [(1, 2), (2, 4), (1, 4), (2, 8)]


def weights(rows, columns, seed=0):
    """Few distinct magnitudes, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (rows, columns), generator=generator).double()


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@given(groups=st.integers(1, 6), rows=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_the_n_largest_are_kept_and_ties_keep_the_earlier(n, m, groups, rows, seed):
    weight = weights(rows, groups * m, seed)
    kept = magnitude_pattern(weight, n, m)
    for row in range(rows):
        for group in range(groups):
            magnitudes = weight[row, group * m : group * m + m].abs().tolist()
            expected = sorted(range(m), key=lambda index: (-magnitudes[index], index))[:n]
            found = kept[row, group * m : group * m + m].nonzero().flatten().tolist()
            assert found == sorted(expected)


def test_not_a_number_is_kept_so_that_it_is_seen():
    weight = torch.tensor([[1.0, float("nan"), 2.0, 3.0]])
    assert magnitude_pattern(weight, 2, 4).tolist() == [[False, True, False, True]]
    assert top_n_of_m(torch.full((1, 4), float("nan")), 2, 4).sum() == 2


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_pruning_commutes_with_sharding(n, m, parts):
    """Both prunings of a shard equal the shard of the pruned matrix, for cuts along either axis."""
    rows, columns = 24 * parts, 32 * parts
    weight = weights(rows, columns)
    row = magnitude_pattern(weight, n, m)
    column = column_pattern(weight, row, n, m)
    for dim in (0, 1):
        pieces = zip(*(tensor.chunk(parts, dim) for tensor in (weight, row, column)), strict=True)
        for part, part_row, part_column in pieces:
            found = magnitude_pattern(part, n, m)
            assert torch.equal(found, part_row)
            assert torch.equal(column_pattern(part, found, n, m), part_column)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_the_second_pruning_drops_only_the_excess(n, m, seed):
    weight = weights(4 * m, 8 * m, seed)
    row = magnitude_pattern(weight, n, m)
    column = column_pattern(weight, row, n, m)
    assert not (column & ~row).any()
    kept = row.unflatten(0, (-1, m)).sum(1)
    survivors = column.unflatten(0, (-1, m)).sum(1)
    assert torch.equal(survivors, kept.clamp(max=n))
    # What was dropped is nowhere larger than what survived in the same group.
    magnitudes = weight.abs().unflatten(0, (-1, m))
    dropped = torch.where((row & ~column).unflatten(0, (-1, m)), magnitudes, -1.0).amax(1)
    weakest = torch.where(column.unflatten(0, (-1, m)), magnitudes, 9.0).amin(1)
    assert (dropped <= weakest).all()


@pytest.mark.parametrize(
    ("n", "m", "percent"), [(1, 2, 12.5), (2, 4, 9.375), (2, 8, 5.840), (1, 4, 7.910)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("kind", ["random", "magnitude"])
def test_extra_zeros_match_the_lemma(n, m, percent, kind):
    assert 100 * extra_zeros(n, m) == pytest.approx(percent, abs=6e-4)
    size = 1024
    key = counter.key_of(5, "w")
    weight = counter.normal(key, range(size), range(size), size)
    if kind == "random":
        row = random_pattern(counter.bits(counter.key_of(5, "p"), range(size), range(size), size), n, m)
    else:
        row = magnitude_pattern(weight, n, m)
    column = column_pattern(weight, row, n, m)
    measured = float((row & ~column).double().mean())
    # A group's loss has a variance below 1: over 2^20/m groups the standard error is below sqrt(m)/2^10/m.
    assert measured == pytest.approx(extra_zeros(n, m), abs=5 * m**0.5 / 1024 / m)


def test_random_patterns_choose_every_pair_equally_often():
    size = 1024
    words = counter.bits(counter.key_of(1, "p"), range(size), range(size), size)
    kept = random_pattern(words, 2, 4).view(-1, 4)
    codes = (kept * torch.tensor([1, 2, 4, 8])).sum(1)
    counts = torch.bincount(codes, minlength=16)[[3, 5, 6, 9, 10, 12]].double()
    groups = kept.shape[0]
    assert counts.sum() == groups
    # Chi-square with 5 degrees of freedom: 30 has probability 1.5e-5.
    assert ((counts - groups / 6) ** 2 / (groups / 6)).sum() < 30
