"""Groups along the tokens of an output gradient: N:M there is N:M along the reduction axis of wgrad.

T tokens, N out. Where m does not divide T, the last group is padded with zeros, which no pruning keeps.
"""

from collections.abc import Callable

import torch

from slope_megatron.sparsity.pattern import highest


def along_tokens(dy_TN: torch.Tensor, m: int, prune: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`prune`, which sees `[N, ceil(T / m) m]`, applied to the transpose; the result is `[T, N]` again."""
    tokens = dy_TN.shape[0]
    dy_NT = torch.nn.functional.pad(dy_TN.t(), (0, -tokens % m))
    return prune(dy_NT)[:, :tokens].t()


def sample_by_sample(x: torch.Tensor) -> torch.Tensor:
    """The tokens of `[s, b, K]` in the order in which those of one sample are neighbours, `[T, K]`; `[T, K]` stays."""
    return x.transpose(0, -2).flatten(0, -2)


def largest_along_tokens(dy: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The n largest of every m tokens of each output, the others zero (Extended SR-STE).

    Args:
        dy: `[T, N]`; or `[s, b, N]`: then groups are along s, adjacent tokens of one sample.
    """
    tokens = dy.shape[0]
    padded = torch.nn.functional.pad(dy, (*(0, 0) * (dy.dim() - 1), 0, -tokens % m))
    members = padded.unflatten(0, (-1, m)).unbind(1)
    kept = highest([member.abs() for member in members], n)
    pruned = [member * keep for member, keep in zip(members, kept, strict=True)]
    return torch.stack(pruned, dim=1).flatten(0, 1)[:tokens]
