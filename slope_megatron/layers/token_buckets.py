"""Token counts of experts, rounded up: they differ in each step, and kernels are chosen, for good, by the count.

Eight sizes an octave: at most an eighth more rows (a sixteenth on average), some tens of choices a weight in a whole
run. No expert's product has no rows: kernels refuse those, and its gradients are zeros.
"""

from collections.abc import Callable

import torch

# What every library's kernels take without padding of their own.
SMALLEST = 16


def bucket(tokens: int) -> int:
    """Rows of the product of so many tokens."""
    unit = max(SMALLEST, 1 << max(tokens.bit_length() - 4, 0))
    return max(-(-tokens // unit), 1) * unit


def in_buckets(multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A product Y `[T, N]` of X `[T, K]` with rows of zeros behind X; autograd drops their gradient."""

    def padded(x_TK: torch.Tensor, *arguments) -> torch.Tensor:
        tokens = x_TK.shape[0]
        x_TK = torch.nn.functional.pad(x_TK, (0, 0, 0, bucket(tokens) - tokens))
        return multiply(x_TK, *arguments)[:tokens]

    return padded
