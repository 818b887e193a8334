"""Problems of `full` mode's wgrad: dY, X, which half of dW is kept, and the random words of the estimate."""

import torch

from helpers.numerics import relative_error
from slope_megatron.sparsity.mvue_rng import MvueRng, as_int32, stream_table
from slope_megatron.sparsity.packing import pack, pack_bits, unpack_bits
from slope_megatron.sparsity.pattern import random_pattern

DTYPE = torch.bfloat16


def rng_of(rows, device, seed=0):
    streams = stream_table([(11, 12)], [range(rows)])
    return MvueRng(as_int32([seed, 99]).to(device), streams.to(device), 2, 4)


def problem(tokens, rows, columns, device, dtype=DTYPE, seed=0):
    """dY, X and which half of dW is kept."""
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, rows, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    words = torch.randint(0, 1 << 32, (rows, columns), generator=generator)
    return dy.to(device), x.to(device), pack_bits(random_pattern(words, 2, 4)).to(device)


def is_near_fp64(found, dy, x, row_bits, rng):
    """No further off than twice the dense product of the same matrices, which rounds as often."""
    estimate, row = rng.estimate(dy), unpack_bits(row_bits)
    assert not torch.equal(estimate, dy)
    exact = pack(estimate.double().t() @ x.double(), row)
    return relative_error(found, exact) <= 2 * relative_error(pack(estimate.t() @ x, row), exact)
