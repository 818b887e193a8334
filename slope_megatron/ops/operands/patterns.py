"""What both libraries of 2:4 kernels ask of a machine and of a weight before they look at their own wants."""

import importlib.util
from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Bitmask -> its version when it was looked at, and what was found.
_seen = WeakTensorKeyDictionary()


def is_two_of_four(row_bits: torch.Tensor) -> bool:
    """Whether a bitmask keeps two of every four weights.

    Looked at once: looking waits for the GPU, and under ZeRO-3 operands are built in every forward and backward.
    """
    version, found = _seen.get(row_bits, (None, False))
    if version != row_bits._version:
        nibbles = torch.stack((row_bits & 15, row_bits >> 4))
        allowed = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=row_bits.device)
        found = bool(torch.isin(nibbles, allowed).all())
        _seen[row_bits] = (row_bits._version, found)
    return found


def without_triton() -> str | None:
    """Why the kernels that write operands cannot run; None: they can."""
    return "triton is not installed" if importlib.util.find_spec("triton") is None else None


def no_operand(
    values_NC: torch.Tensor, row_bits: torch.Tensor, unsupported_shape: Callable[[int, int, torch.dtype], str | None]
) -> str | None:
    """Why a weight cannot be an operand of 2:4 kernels; None: it can.

    Args:
        unsupported_shape: (rows, columns, dtype) -> what the library does not take, or None.
    """
    if values_NC.device.type != "cuda":
        return f"the weight is on {values_NC.device.type}"
    rows, columns = row_bits.shape[0], row_bits.shape[1] * 8
    reason = unsupported_shape(rows, columns, values_NC.dtype)
    if reason:
        return f"the weight is {reason}"
    if values_NC.shape[1] * 2 != columns or not is_two_of_four(row_bits):
        return "its row pattern is not 2:4"
    return None
