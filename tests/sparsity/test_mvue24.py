"""The kernel's form of the 2:4 estimator: against the general one, and what 16 bits do to it."""

import pytest
import torch

from slope_megatron.sparsity import counter
from slope_megatron.sparsity.mvue import keep_probabilities, mvue
from slope_megatron.sparsity.mvue24 import two_of_four

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def words(count, seed):
    return counter.bits(counter.key_of(seed, "mvue24"), range(1), range(count), count)[0]


def test_places_are_kept_with_the_least_variance_s_probabilities():
    """The comb's start swept over an even grid, on groups with one, none and ties of dominant numbers."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(48, 4, generator=generator) * torch.exp(2.0 * torch.randn(48, 4, generator=generator))
    groups[::7, 2] = 0.0
    groups[::5, 1] = groups[::5, 3]
    grid = 4096
    starts = torch.arange(grid) * (2**23 // grid)
    values, indices = two_of_four(groups.expand(grid, -1, -1), starts[:, None, None].expand(grid, 48, 1))
    share = torch.zeros(48, 4, dtype=torch.float64)
    for slot in range(2):
        share += torch.nn.functional.one_hot(indices[:, :, 0, slot], 4).double().mean(0)
    expected, _ = keep_probabilities(groups.abs().double(), 2)
    # An interval's share of a grid is its length to within one point at each end; an element has two intervals at most.
    assert float((share - expected).abs().max()) <= 4 / grid
    assert (indices[..., 0] < indices[..., 1]).all()
    kept = groups.expand(grid, -1, -1).gather(-1, indices[:, :, 0])
    enlarged = torch.where(share > 0, groups / expected.clamp_min(1e-30), 0.0).float()
    wanted = enlarged.expand(grid, -1, -1).gather(-1, indices[:, :, 0])
    assert torch.allclose(values, wanted, rtol=1e-6) and (kept != 0).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_rounding_keeps_the_mean(dtype):
    """c lies halfway between two 16-bit numbers: always to round it to the same one would move the mean by 7 errors."""
    step = torch.finfo(dtype).eps
    group = torch.tensor([0.5, 0.5, 0.5, 0.5 + step], dtype=dtype)
    draws = 20_000
    samples = mvue(group.expand(draws, 4), words(draws, 1)[:, None], 2, 4)
    assert len(samples[samples > 0].unique()) == 2
    # Two numbers c are kept in every draw: their sum has the rounding's variance alone.
    total = samples.double().sum(-1)
    error = float(total.std()) / draws**0.5
    assert abs(float(total.mean() - group.double().sum())) < 5 * error
    assert step / 2 > 7 * error


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_what_fits_is_kept_to_the_bit(dtype):
    smallest, largest = torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max
    few = torch.tensor(
        [[0.0, smallest, 0.0, -largest], [smallest, 0.0, 0.0, -smallest], [0.0, 0.0, -1.7, 0.0], [0.0, 0.0, 0.0, 0.0]]
    ).to(dtype)
    assert few[0, 1] > 0
    for seed in range(20):
        assert torch.equal(mvue(few, words(4, seed)[:, None], 2, 4), few)
    # Every start of the comb that might round to its end.
    edges = torch.tensor([0, 1, 2**22, 2**23 - 2, 2**23 - 1])
    assert torch.equal(mvue(few[:, None].expand(-1, 5, -1), edges[None, :, None].expand(4, 5, 1), 2, 4)[:, 4], few)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_sums_do_not_overflow_and_estimates_that_do_say_so(dtype):
    largest = torch.finfo(dtype).max
    large = torch.tensor([[0.4 * largest] * 3 + [0.0], [largest] * 4]).to(dtype)
    found = mvue(large, words(2, 3)[:, None], 2, 4)
    assert found[0].isfinite().all() and int((found[0] != 0).sum()) == 2
    assert found[1].isnan().any()
