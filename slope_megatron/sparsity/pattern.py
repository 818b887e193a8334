"""N:M patterns: which weights are kept, and which of those survive the second pruning along the other axis.

N out, K in; a mask is a bool tensor `[N, K]`, True where the weight is kept. The row pattern keeps n of every m
consecutive weights of a row (the reduction axis of the forward product); the column pattern keeps at most n of every m
consecutive weights of a column of what the row pattern left (the reduction axis of dgrad). Source: SLoPe, section 3.1.
"""

from collections.abc import Sequence
from math import comb

import torch


def top_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n highest of every m consecutive scores along the last axis; of equal ones the earlier.

    Args:
        scores: `[..., K]`, K a multiple of m. NaN and infinity count as the largest finite number.
    Returns:
        bool, same shape, exactly n True in each group.
    """
    columns = [column.contiguous() for column in scores.unflatten(-1, (-1, m)).unbind(-1)]
    return torch.stack(highest(columns, n), dim=-1).flatten(-2)


def highest(columns: Sequence[torch.Tensor], n: int) -> list[torch.Tensor]:
    """At each position: which of the columns' scores are the n highest; ties, NaN and infinity as above.

    Args:
        columns: the scores of one place in all groups each; of one shape.
    Returns:
        bool, of that shape, for each column.
    """
    if columns[0].is_floating_point():
        columns = [torch.nan_to_num(column, nan=torch.finfo(column.dtype).max) for column in columns]
    ranks = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    # A score's rank is the number of those that come before it: one comparison for each pair of a group, no sort.
    for later in range(len(columns)):
        for earlier in range(later):
            earlier_is_first = columns[earlier] >= columns[later]
            ranks[later] += earlier_is_first
            ranks[earlier] += ~earlier_is_first
    return [rank < n for rank in ranks]


def magnitude_pattern(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Row pattern by magnitude: bool `[N, K]`."""
    return top_n_of_m(weight.abs(), n, m)


def random_pattern(words: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Row pattern from random words `[N, K]` (`counter.bits`): every choice of n of m is equally likely."""
    return top_n_of_m(words, n, m)


def column_pattern(weight: torch.Tensor, row_pattern: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The second pruning: of the kept weights, the n largest of every m consecutive ones of each column.

    A column group with at most n kept weights loses none. Ties keep the lower row.

    Args:
        weight: `[N, K]`, N a multiple of m; only its values at kept positions matter.
        row_pattern: bool `[N, K]`.
    Returns:
        bool `[N, K]`, a subset of `row_pattern`.
    """
    # Dropped weights rank below every kept one, a kept zero too.
    scores = torch.where(row_pattern, weight.abs(), torch.full((), -1.0, dtype=weight.dtype, device=weight.device))
    survives = top_n_of_m(scores.t().contiguous(), n, m).t()
    return survives & row_pattern


def extra_zeros(n: int, m: int) -> float:
    """Share of all weights that the second pruning zeroes when rows are independent (SLoPe, lemma 2.1, corrected).

    (1/m) sum over j > n of C(m, j) s^j (1-s)^(m-j) (j - n), with s = n/m. 2:4 gives 0.09375.
    """
    s = n / m
    return sum(comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) for j in range(n + 1, m + 1)) / m
