"""The packed layout: dense -> packed -> dense exact, and AdamW that cannot tell the difference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_megatron.sparsity.packing import kept_index, pack, pack_bits, unpack, unpack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern

PATTERNS = [(1, 2), (2, 4), (1, 4), (2, 8)]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@given(rows=st.integers(1, 9), units=st.integers(1, 4), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_dense_to_packed_to_dense_is_exact(n, m, rows, units, seed):
    weight = torch.randn(rows, units * 32, generator=torch.Generator().manual_seed(seed))
    mask = magnitude_pattern(weight, n, m)
    values = pack(weight, mask)
    assert values.shape == (rows, units * 32 * n // m)
    assert torch.equal(unpack(values, mask), weight * mask)
    assert torch.equal(weight.gather(1, kept_index(mask)), values)
    assert torch.equal(unpack_bits(pack_bits(mask)), mask)


def test_the_layout_is_left_to_right_and_lowest_bit_first():
    weight = torch.arange(1.0, 9.0)[None]
    mask = torch.tensor([[True, False, False, True, False, True, True, False]])
    assert pack(weight, mask).tolist() == [[1.0, 4.0, 6.0, 7.0]]
    assert pack_bits(mask).tolist() == [[0b01101001]]
    assert pack_bits(mask).dtype == torch.uint8


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_packed_adamw_equals_masked_dense_adamw_to_the_bit(n, m):
    torch.manual_seed(0)
    dense = torch.randn(16, 64)
    mask = magnitude_pattern(dense, n, m)
    masked = torch.nn.Parameter(dense * mask)
    packed = torch.nn.Parameter(pack(dense, mask))
    settings_ = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW([parameter], **settings_) for parameter in (masked, packed)]
    for _ in range(20):
        gradient = torch.randn(16, 64)
        masked.grad, packed.grad = gradient * mask, pack(gradient, mask)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(unpack(packed.detach(), mask), masked.detach())
