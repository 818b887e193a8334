"""S-STE's soft threshold and its scale against few lines of plain torch, on fresh numbers."""

import pytest
import torch

from slope_megatron.sparsity.packing import pack_bits, unpack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern
from slope_megatron.sparsity.soft_threshold import as_multiplied, scale_of, scale_sums, soft_threshold


def plain(weight):
    groups = weight.unflatten(-1, (-1, 4))
    second = groups.abs().sort(dim=-1).values[..., 1:2]
    return torch.where(groups.abs() > second, groups - groups.sign() * second, 0.0).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_exceeds_the_second_smallest_is_left(dtype):
    weight = torch.randn(12, 32).to(dtype)
    weight[0, :4], weight[1, :4], weight[2, :4] = 0.0, 1.0, torch.tensor([2.0, -2.0, -2.0, 1.0])
    found = soft_threshold(weight)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found, plain(weight.to(found.dtype)))
    assert found[:3, :4].abs().sum() == 0, "of equal ones none exceeds"
    kept = found[3:] != 0
    assert torch.equal(kept, magnitude_pattern(weight, 2, 4)[3:]), "the two largest, without ties"


def test_it_has_no_jumps():
    """As w moves, S(w) moves at most twice as far, also where two weights change places."""
    path = torch.randn(200, 16, dtype=torch.float64).cumsum(0) * 0.01
    step, moved = path.diff(dim=0).abs(), soft_threshold(path).diff(dim=0).abs()
    changes = (soft_threshold(path) != 0).diff(dim=0)
    assert changes.any() and not changes.all()
    assert (moved.unflatten(-1, (-1, 4)).amax(-1) <= 2 * step.unflatten(-1, (-1, 4)).amax(-1) + 1e-12).all()


def test_a_group_without_a_number_hides_nothing():
    weight = torch.randn(1, 8)
    weight[0, 2] = torch.nan
    assert torch.equal(soft_threshold(weight).isnan(), torch.tensor([[True] * 4 + [False] * 4]))


def test_the_scale_is_that_of_least_squares_also_of_shards():
    weight = torch.randn(16, 32, dtype=torch.float64)
    pruned = plain(weight)
    best = torch.linalg.lstsq(pruned.flatten()[:, None], weight.flatten()[:, None]).solution.item()
    scale = scale_of(scale_sums(weight))
    assert scale.shape == (1,) and scale.dtype == torch.float32 and scale.item() == pytest.approx(best, rel=1e-6)
    for shards in (weight.split(4), weight.split(8, dim=1)):
        assert scale_of(sum(map(scale_sums, shards))).item() == pytest.approx(best, rel=1e-6)
    assert scale_of(scale_sums(torch.ones(4, 8))).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_multiplied(dtype):
    weight, scale = torch.randn(8, 32).to(dtype), torch.rand(1) + 1.0
    mask = magnitude_pattern(weight, 2, 4)
    bits = pack_bits(mask)
    assert as_multiplied(weight) is weight
    assert torch.equal(as_multiplied(weight, bits), weight * unpack_bits(bits))
    found = as_multiplied(weight, bits, scale)
    exact = scale.double() * plain(weight.double())
    # One rounding, after those of the difference and the product in fp32.
    bound = exact.abs() * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * weight.abs().max().double()
    assert found.dtype == dtype and ((found.double() - exact).abs() <= bound).all()
    assert (found.double().abs() > 0).sum() > 0 and not (found[~mask] != 0).any()
