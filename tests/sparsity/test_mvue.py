"""The unbiased estimator against its definition: mean, variance, count, and the cases that are exact."""

import itertools

import pytest
import torch

from slope_megatron.sparsity import counter
from slope_megatron.sparsity.mvue import draw, keep_probabilities, mvue
from slope_megatron.sparsity.tokens import along_tokens


def words(count, seed):
    """`count` random words, as training draws them."""
    return counter.bits(counter.key_of(seed, "mvue"), range(1), range(count), count)[0]


def gradients(groups, m, seed):
    """Groups of very different spreads, with zeros and ties among them."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(groups, 1, generator=generator) * 3.0
    numbers = torch.randn(groups, m, generator=generator) * torch.exp(
        spread * torch.randn(groups, m, generator=generator)
    )
    numbers[::7, 0] = 0.0
    numbers[::5, 1] = numbers[::5, 2 % m]
    numbers[::11] = numbers[::11].sign()
    return numbers


def least_variance(group):
    """Chmiel et al., section 3, as published: `group` holds 2 numbers for 1:2, 4 for 2:4."""
    a = group.abs().double().sort().values
    if len(a) == 2:
        return float(2 * a[0] * a[1])
    if a[3] <= a[:3].sum():
        return float(a.sum() ** 2 / 2 - a.square().sum())
    return float(a[:3].sum() ** 2 - a[:3].square().sum())


def variance(probabilities, group):
    size = group.abs().double()
    terms = torch.where(size > 0, size.square() / probabilities.clamp_min(1e-300), torch.zeros_like(size))
    return float(terms.sum() - size.square().sum())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2)])
def test_the_variance_is_the_least_there_is(n, m):
    groups = gradients(300, m, seed=1)
    indices = list(itertools.combinations(range(m), n))
    membership = torch.tensor([[float(i in pair) for i in range(m)] for pair in indices], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(2000, len(indices), generator=generator, dtype=torch.float64).pow(4.0)
    others = (weights / weights.sum(-1, keepdim=True)) @ membership  # inclusion probabilities of any way to draw
    for group in groups:
        p, _ = keep_probabilities(group.abs().double(), n)
        ours = variance(p, group)
        # fp64 rounding of sums of squares
        bound = 1e-12 * float(group.double().square().sum()) + 1e-300
        assert ours == pytest.approx(least_variance(group), abs=1e3 * bound)
        size = group.abs().double()
        rest = torch.where(size > 0, size.square() / others, torch.zeros_like(size)).sum(-1) - size.square().sum()
        assert float(rest.min()) >= ours - bound


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (2, 8), (3, 4)])
def test_places_are_kept_with_their_probability(n, m):
    """The comb's start swept over an even grid: each element is hit as often as its probability says."""
    size = gradients(64, m, seed=3).abs().double()
    p, certain = keep_probabilities(size, n)
    nonzero = (size > 0).sum(-1)
    assert torch.allclose(p.sum(-1), nonzero.clamp(max=n).double())
    grid = 4000
    starts = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    kept = draw(p.expand(grid, -1, -1), certain.expand(grid, -1, -1), starts[:, None, None].expand(grid, 64, 1), n)
    assert int(kept.sum(-1).max()) <= n
    # An interval's share of a grid is its length to within one point at each end; an element meets at most n intervals.
    assert float((kept.double().mean(0) - p).abs().max()) <= 2 * n / grid


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2)])
def test_the_mean_is_the_gradient_and_the_product_too(n, m):
    draws, tokens, out, width = 3000, 16, 6, 5
    dy = torch.randn(out, tokens, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    dy = dy + 0.3 * dy.sign()  # a number that is hardly ever drawn would need more draws
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    samples = mvue(dy.expand(draws, -1, -1), words(draws * out * tokens // m, 6).view(draws, out, -1), n, m)
    assert int((samples.unflatten(-1, (-1, m)) != 0).sum(-1).max()) <= n
    for found, expected in ((samples, dy), (samples @ x, dy @ x)):
        error = found.mean(0) - expected
        spread = found.std(0) / draws**0.5
        exact = spread == 0
        assert float(error[exact].abs().sum()) <= 1e-12
        # About 100 z-scores: one above 5 in 20,000 tests.
        assert float((error[~exact] / spread[~exact]).abs().max()) < 5.0
    assert float((samples.std(0) > 0).double().mean()) > 0.4, "something must have been random"


def test_what_fits_is_kept_as_it_is():
    few = torch.tensor([[0.0, 3e-30, 0.0, -7.1], [0.0, 0.0, 0.0, 0.0], [1.7, 0.0, 0.0, 0.0], [-2.3, 0.0, 2.3, 0.0]])
    for seed in range(20):
        assert torch.equal(mvue(few, words(4, seed)[:, None], 2, 4), few)
    tied = torch.full((1, 4), -3.0)
    for seed in range(20):
        found = mvue(tied, words(4, seed)[None, :1], 2, 4)
        assert sorted(found[0].tolist()) == [-6.0, -6.0, 0.0, 0.0]


def test_what_is_not_finite_is_not_hidden():
    broken = torch.tensor([[1.0, torch.inf, 2.0, 3.0], [torch.nan, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]])
    found = mvue(broken, words(4, 0)[:3, None], 2, 4)
    assert found[:2].isnan().any(-1).all() and torch.equal(found[2], broken[2])


def test_a_last_group_may_be_short():
    """Tokens are filled up with zeros, which are never drawn: 6 tokens are a group and a half."""
    dy = torch.randn(6, 3, generator=torch.Generator().manual_seed(7))
    found = along_tokens(dy, 4, lambda dy_NT: mvue(dy_NT, words(8, 8)[:6].view(3, 2), 2, 4))
    assert found.shape == dy.shape
    assert torch.equal(found[4:], dy[4:]), "two numbers in a group of four are exact"
    assert int((found[:4] != 0).sum(0).max()) == 2
