"""e4m3 in plain torch: exact scales, the nearest value, and what is not finite."""

import pytest
import torch

from slope_megatron.sparsity import float8

FINITE = torch.arange(256, dtype=torch.uint8).view(float8.E4M3).float()
FINITE = FINITE[FINITE.isfinite()]


@pytest.mark.parametrize("amax", [448.0, 449.0, 1.0, 0.875, 0.876, 3e38, 1e-27, 2.0**-24, 65504.0])
def test_the_scale_is_the_smallest_power_of_two_that_holds_the_largest_value(amax):
    scale = float(float8.scale_of(torch.tensor(amax)))
    significand, _ = torch.frexp(torch.tensor(scale))
    assert significand == 0.5
    assert amax <= 448.0 * scale
    assert amax > 448.0 * scale / 2


def test_zeros_have_a_scale_and_stay_zeros():
    assert torch.equal(float8.rounded(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 3e-4, 90.0])
def test_every_element_becomes_the_nearest_value(dtype, std):
    x = (torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * std).to(dtype)
    q, scale = float8.quantize(x)
    nearest = (x.double()[..., None] - (FINITE.double() * scale.double())).abs().amin(-1)
    assert torch.equal((q.double() * scale.double() - x.double()).abs(), nearest)
    # Scales are powers of two: the rounded values are numbers of x's own type.
    assert torch.equal(float8.rounded(x).double(), q.double() * scale.double())


def test_rounding_again_changes_nothing():
    once = float8.rounded(torch.randn(64, 64))
    assert torch.equal(float8.rounded(once), once)


def test_a_scale_from_elsewhere_saturates():
    q, _ = float8.quantize(torch.tensor([-1000.0, 1.0, 1000.0]), torch.tensor(1.0))
    assert q.float().tolist() == [-448.0, 1.0, 448.0]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_spoils_the_whole_tensor_and_its_products(value):
    x = torch.randn(4, 8)
    x[1, 2] = value
    assert float8.rounded(x).isnan().all()


def test_a_product_of_e4m3_matrices_is_that_of_the_rounded_ones():
    x, w = torch.randn(16, 32).to(torch.bfloat16), torch.randn(8, 32).to(torch.bfloat16)
    bias = torch.randn(8).to(torch.bfloat16)
    (q, q_scale), (p, p_scale) = float8.quantize(x), float8.quantize(w)
    found = float8.scaled_mm(q, p, q_scale, p_scale, bias, torch.bfloat16)
    expected = float8.rounded(x).double() @ float8.rounded(w).double().t() + bias.double()
    # Two roundings to bf16: of the sums, and with the bias.
    assert torch.allclose(found.double(), expected, rtol=2**-7, atol=2**-8 * float(expected.abs().max()))
