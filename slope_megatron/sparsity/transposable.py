"""Transposable 2:4 masks: two kept in every row and every column of each 4 x 4 block (FST, arXiv 2404.01847).

W and its transpose are then 2:4 at once, so dgrad is exact. There are 90 such blocks; the search tries all of them.
"""

import functools
import itertools

import torch


@functools.cache
def patterns() -> torch.Tensor:
    """All blocks with two ones in each row and each column: fp64 `[90, 16]`, row-major."""
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    blocks = torch.tensor(list(itertools.product(rows, repeat=4)), dtype=torch.float64)
    return blocks[(blocks.sum(1) == 2).all(-1)].flatten(1)


def transposable_mask(weight_NK: torch.Tensor) -> torch.Tensor:
    """The mask that keeps the most magnitude: bool `[N, K]`, N and K multiples of 4; of equal ones the first.

    Sums are in fp64, where their order does not show: every shard finds the mask of the whole.
    """
    rows, columns = weight_NK.shape
    blocks = weight_NK.abs().double().unflatten(0, (-1, 4)).unflatten(-1, (-1, 4)).transpose(1, 2).flatten(-2)
    table = patterns().to(weight_NK.device)
    best = (blocks @ table.t()).argmax(-1)
    mask = table[best].bool().unflatten(-1, (4, 4))
    return mask.transpose(1, 2).reshape(rows, columns)
