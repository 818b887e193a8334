"""A large matrix worked through some rows at a time: that bounds the scratch memory, and fits a CPU's cache."""

from collections.abc import Iterator

import torch

# Both are whole groups and whole bytes of bitmasks, whatever N:M is.
ROWS_ON_GPU = 4096
ROW_UNIT = 8
# Of what the generator computes, 16 bytes an element: 2 to 8 MB.
ELEMENTS_ON_CPU = 1 << 18


def rows_at_once(columns: int, device: torch.device) -> int:
    """Rows of `columns` elements to take at once."""
    if device.type != "cpu":
        return ROWS_ON_GPU
    return max(ROW_UNIT, ELEMENTS_ON_CPU // columns // ROW_UNIT * ROW_UNIT)


def pieces(rows: range, columns: int, device: torch.device) -> Iterator[range]:
    """`rows` in pieces of `rows_at_once`; the last one may be smaller."""
    size = rows_at_once(columns, device)
    return (range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))
