"""H = X L beside a copy of X, against plain torch: whole numbers, so equal to the bit, on poisoned outputs."""

import functools

import pytest
import torch

from helpers import numerics

# The interpreter multiplies the bits of bf16 as if they were integers.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


whole_numbers = functools.partial(numerics.whole_numbers, dtype=DTYPE)


def poisoned(*shape, device):
    return torch.full(shape, float("nan"), dtype=DTYPE, device=device)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "columns", "rank", "padded"), [(64, 128, 16, 32), (37, 72, 5, 32), (130, 64, 40, 64)]
)
def test_down_writes_the_hidden_and_the_joined_input(tokens, columns, rank, padded, transposed, device):
    from slope_kernels.triton.low_rank import down

    x = whole_numbers(tokens, columns, device=device)
    factor = (
        whole_numbers(columns, rank, device=device).t() if transposed else whole_numbers(rank, columns, device=device)
    )
    # Sums of at most 130 whole numbers of one digit, times a power of two: 16 bits hold them.
    expected = (x.double() @ factor.double().t() / 4).to(DTYPE)
    hidden, joined = poisoned(tokens, rank, device=device), poisoned(tokens, columns + 2 * padded, device=device)
    down(x, factor, hidden, joined, padded=padded, scale=0.25)
    assert torch.equal(hidden, expected)
    filled = torch.nn.functional.pad(expected, (0, padded - rank))
    assert torch.equal(joined, torch.cat((x, filled, filled), 1))


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [40, 80, 144, 256])
def test_down_is_right_with_many_tiles_in_flight(rank, transposed, device):
    """A tile that is overwritten too early shows on a whole device alone, and not each time."""
    from slope_kernels.triton.low_rank import down

    tokens, columns, padded = 8192, 2560, rank + -rank % 32
    x = torch.randn(tokens, columns, device=device, dtype=DTYPE)
    factor = torch.randn(rank, columns, device=device, dtype=DTYPE)
    factor = factor.t().contiguous().t() if transposed else factor
    expected = x.double() @ factor.double().t() / 64
    for _ in range(5):
        hidden, joined = poisoned(tokens, rank, device=device), poisoned(tokens, columns + 2 * padded, device=device)
        down(x, factor, hidden, joined, padded=padded, scale=1 / 64)
        assert torch.equal(joined[:, :columns], x)
        for found in (
            hidden,
            joined[:, columns : columns + rank],
            joined[:, columns + padded : columns + padded + rank],
        ):
            assert (found.double() - expected).norm() < 3e-3 * expected.norm()
