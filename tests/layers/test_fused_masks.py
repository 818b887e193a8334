"""The baselines' masks on a GPU are those of plain torch, and FST's wgrad is the product with its estimate."""

import pytest
import torch

from slope_megatron.layers import masks
from slope_megatron.sparsity import tokens
from slope_megatron.sparsity.packing import pack_bits, unpack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern
from slope_megatron.sparsity.soft_threshold import as_multiplied

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros' signs included; all that is not a number is alike."""
    bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    return bits.masked_fill(tensor.isnan(), -1)


def gradient(count: int, dtype, device) -> torch.Tensor:
    """`[T, 128]` with ties, zeros, a NaN and an infinity in it."""
    dy = torch.randn(count, 128, device=device).to(dtype)
    dy[4:8], dy[8:10], dy[1, 1], dy[2, 2] = 1.0, 0.0, float("nan"), float("inf")
    return dy


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "n", "m"), [(64, 2, 4), (62, 2, 4), (64, 2, 8), (64, 1, 4)])
def test_the_pruned_gradient(dtype, count, n, m):
    dy = gradient(count, dtype, "cuda")
    found, expected = masks.largest_along_tokens(dy, n, m), tokens.largest_along_tokens(dy, n, m)
    assert torch.equal(bits_of(found), bits_of(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (2, 8)])
def test_masks_and_what_they_leave(dtype, n, m):
    weight = gradient(192, dtype, "cuda")
    bits = masks.magnitude_bits(weight, n, m)
    assert torch.equal(bits, pack_bits(magnitude_pattern(weight, n, m)))
    out = torch.empty_like(weight)
    assert masks.mask_into(out, weight, bits) is not None
    assert torch.equal(bits_of(out), bits_of(weight * unpack_bits(bits)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_soft_threshold(dtype):
    weight, scale = gradient(192, dtype, "cuda"), torch.rand(1, device="cuda") + 1.0
    bits, out = masks.magnitude_bits(weight, 2, 4), torch.empty_like(weight)
    assert masks.mask_into(out, weight, bits, scale) is not None
    assert torch.equal(bits_of(out), bits_of(as_multiplied(weight, bits, scale)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("start", "count"), [(0, 64 * 128), (37, 1000)])
def test_the_decay_of_a_part_of_a_weight(device, start, count):
    matrix = torch.randn(64, 128, device=device)
    mask = magnitude_pattern(matrix, 2, 4)
    weight = matrix.flatten()[start : start + count].clone()
    found, before = torch.randn(2, count, device=device).unbind()
    expected = before + 0.25 * torch.where(mask.flatten()[start : start + count], 0.0, weight)
    found.copy_(before)
    masks.add_decay_(found, weight, pack_bits(mask), start, 0.25)
    assert torch.allclose(found, expected, rtol=2e-7, atol=1e-7) and not torch.equal(found, before)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1024, 1000])
def test_wgrad_of_the_estimate_with_nothing_dropped(count):
    from slope_megatron.ops.operands import wgrad
    from slope_megatron.sparsity.mvue_rng import MvueRng, as_int32, stream_table

    dy, x = torch.randn(2, count, 256, device="cuda", dtype=torch.bfloat16).unbind()
    rng = MvueRng(as_int32([3, 4]).cuda(), stream_table([(5, 6)], [range(256)]).cuda(), 2, 4)
    found = wgrad.dense(dy, x, rng).double()
    expected = rng.estimate(dy).double().t() @ x.double()
    assert float((found - expected).norm() / expected.norm()) < 4e-3, "two roundings to bf16"
