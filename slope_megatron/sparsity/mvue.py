"""The minimum-variance unbiased N:M estimator of a gradient.

A group of m numbers a_i is replaced by at most n of them: a_i is kept with probability p_i and then enlarged to
a_i / p_i, so that the mean over the draws is a_i. Its variance is sum_i a_i^2 / p_i - sum_i a_i^2, and with p_i <= 1
and sum p_i = n it is smallest where

    p_i = min(1, |a_i| / c),  c such that sum p_i = n

which for 1:2 and 2:4 is the estimator of Chmiel et al., "Minimum variance unbiased N:M sparsity for the neural
gradients" (arXiv 2203.10991, section 3): only the p_i enter its variance, so any way to draw n elements with these
probabilities serves. Here it is systematic sampling (Madow 1949): the p_i laid end to end on a line, and the n elements
that a comb of unit spacing with a random start hits; one random word a group. `mvue24` is the same for 2:4, without
divisions: what the kernel computes.

Groups with at most n non-zeros come back as they are. A group that holds an infinity or NaN does not hide it.
"""

import torch

from slope_megatron.sparsity.mvue24 import two_of_four
from slope_megatron.sparsity.operand import scatter_slots


def keep_probabilities(size: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(p, certain)`, both `[..., m]`: the probability of each element, and where it is one.

    Args:
        size: |a|, `[..., m]`, fp64.
    """
    certain = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(n):
        rest, budget = _rest(size, certain, n)
        certain = certain | ((size > 0) & (budget * size >= rest))
    rest, budget = _rest(size, certain, n)
    share = torch.where(rest > 0, budget * size / rest, torch.zeros_like(size))
    return torch.where(certain, torch.ones_like(size), share), certain


def _rest(size: torch.Tensor, certain: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the elements that are not certain add up to, and how many of them can be kept: `[..., 1]` each."""
    rest = torch.where(certain, torch.zeros_like(size), size).sum(-1, keepdim=True)
    return rest, n - certain.sum(-1, keepdim=True)


def draw(probabilities: torch.Tensor, certain: torch.Tensor, uniform: torch.Tensor, n: int) -> torch.Tensor:
    """Which elements are kept: bool `[..., m]`, at most n in each group.

    Args:
        uniform: fp64 `[..., 1]` in (0, 1): where the comb starts.
    """
    uncertain = torch.where(certain, torch.zeros_like(probabilities), probabilities)
    upper = uncertain.cumsum(-1)
    lower = torch.cat((torch.zeros_like(upper[..., :1]), upper[..., :-1]), -1)
    teeth = n - certain.sum(-1, keepdim=True)
    # The line is as long as there are teeth, but for rounding: the comb is stretched to it, so none falls off.
    spacing = upper[..., -1:] / teeth.clamp(min=1)
    kept = certain
    for tooth in range(n):
        at = (uniform + tooth) * spacing
        kept = kept | ((lower <= at) & (at < upper) & (tooth < teeth))
    return kept


def mvue(gradient: torch.Tensor, words: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The estimate of `gradient`, n:m along its last axis; in its type.

    Args:
        gradient: `[..., S]`, S a multiple of m.
        words: random 32-bit words (`counter.bits`), int64 `[..., S/m]`: one a group.
    """
    if (n, m) == (2, 4):
        return scatter_slots(*two_of_four(gradient, words))
    groups = gradient.unflatten(-1, (-1, m)).double()
    size = groups.abs()
    uniform = (words[..., None].double() + 0.5) * 2.0**-32
    probabilities, certain = keep_probabilities(size, n)
    kept = draw(probabilities, certain, uniform, n)
    estimate = torch.where(kept, groups / probabilities, torch.zeros_like(groups))
    finite = size.sum(-1, keepdim=True).isfinite()
    return torch.where(finite, estimate, torch.full_like(estimate, torch.nan)).flatten(-2).to(gradient.dtype)
