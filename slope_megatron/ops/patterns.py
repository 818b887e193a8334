"""What a bitmask on the GPU is, looked at once: looking waits for the GPU, and under ZeRO-3 operands are built in every
forward and backward."""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Bitmask -> its version when it was looked at, and what was found.
_seen = WeakTensorKeyDictionary()


def is_two_of_four(row_bits: torch.Tensor) -> bool:
    """Whether a bitmask keeps two of every four weights."""
    version, found = _seen.get(row_bits, (None, False))
    if version != row_bits._version:
        nibbles = torch.stack((row_bits & 15, row_bits >> 4))
        allowed = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=row_bits.device)
        found = bool(torch.isin(nibbles, allowed).all())
        _seen[row_bits] = (row_bits._version, found)
    return found
