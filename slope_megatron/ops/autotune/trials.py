"""What a measurement works on: a trial of one product, and the candidates for it. T tokens, R rows of the operand."""

from typing import Any, Protocol

import torch

from slope_megatron.ops.choices import Key
from slope_megatron.sparsity.packing import pack_bits
from slope_megatron.sparsity.pattern import random_pattern

# Rows of a large tensor that are worked on at once.
ROWS_AT_ONCE = 4096


class Trial(Protocol):
    """Random data of one product, room for its Y and the right answer."""

    key: Key
    y_TR: torch.Tensor
    expected_TR: torch.Tensor

    def poison(self) -> None:
        """NaNs into all that a candidate writes on its way to Y: what it leaves out then shows."""

    def dense_product(self) -> torch.Tensor:
        """The dense candidate."""


class Candidate(Protocol):
    """A sparse product of a trial; a call enqueues it."""

    @property
    def trial(self) -> Trial: ...

    @property
    def tiles(self) -> int: ...

    @property
    def algorithm(self) -> Any: ...

    def __call__(self) -> None: ...


def random_bits(rows: int, columns: int, device) -> torch.Tensor:
    """Bitmask uint8 `[rows, columns/8]` of a random 2:4 pattern."""
    parts = []
    for start in range(0, rows, ROWS_AT_ONCE):
        words = torch.randint(0, 1 << 30, (min(ROWS_AT_ONCE, rows - start), columns), device=device, dtype=torch.int32)
        parts.append(pack_bits(random_pattern(words, 2, 4)))
    return torch.cat(parts)
