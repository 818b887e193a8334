"""The study's CSV file: a row a finished run, appended as it comes; rows that are there are never written again."""

import csv
import dataclasses
import io
import os
import types
import typing
from pathlib import Path

from slope_megatron.config.text_file import lines_of, read_text
from slope_megatron.storage import whole

DONE, DIVERGED = "done", "diverged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one run gave; its fields are the file's columns. Empty: not known.

    Args:
        key: of the run's settings and data (`runs.Run.key`).
        outcome: DONE, or DIVERGED, which has no loss.
        val_loss: nats a token, at the last step.
        body_parameters: of the size's dense model, without embeddings; `parameters`: all that the run held.
        average_parameters: in the blocks, of what was multiplied, averaged over the steps.
        flops: of the whole run, as a dense model of this shape; `actual_flops`: without what 2:4 leaves out.
        state_bytes: weights, patterns, operands, gradients, optimizer, measured in the run; with a dense start or tail,
            of the form that holds most.
        seconds: of its steps, with `at_once` runs on the device.
        data: of its tokens and tokenizer, which has `vocabulary` entries.
    """

    name: str
    key: str
    group: str
    size: str
    method: str
    lr: float
    seed: int
    outcome: str
    val_loss: float | None
    train_loss: float | None
    tokens: int
    steps: int
    body_parameters: int
    parameters: int | None
    average_parameters: float
    flops: float
    actual_flops: float
    state_bytes: int | None
    seconds: float | None
    tokens_per_second: float | None
    bad_steps: int | None
    device: str
    at_once: int
    vocabulary: int | None
    data: str
    version: str


COLUMNS = [field.name for field in dataclasses.fields(Row)]
TYPES = {name: kind for name, kind in typing.get_type_hints(Row).items()}


class Rows:
    """The rows of a file, by key and by name."""

    def __init__(self, path: Path, rows: list[Row]):
        self.path = path
        self.rows = rows
        self.by_key = {row.key: row for row in rows}

    @classmethod
    def read(cls, path: Path) -> "Rows":
        """The rows of a file; none where there is none yet. A last line that was cut short is none.

        Raises:
            ValueError: it is no such file, or a line cannot be read; names the line.
        """
        if not path.exists():
            return cls(path, [])
        header, lines = content_of(read_text(path))
        if header and not {"key", "name"} <= set(header):
            raise ValueError(f"--rows {path} is no file of rows of a study (no columns name and key): give another one")
        return cls(path, [parsed(path, number, line) for number, line in enumerate(lines, 2)])

    def find(self, key: str) -> Row | None:
        return self.by_key.get(key)

    def append(self, row: Row) -> None:
        """Add one row to the file: by one write at its end, so that a reader sees all of it or nothing.

        A file that is new, lacks columns, or has no end of its last line is written anew, in one step, with all that
        it holds by then, columns of others included.
        """
        self.rows.append(row)
        self.by_key[row.key] = row
        before = read_text(self.path) if self.path.exists() else ""
        header, lines = content_of(before)
        cells = dict(zip(COLUMNS, values_of(row), strict=True))
        if set(COLUMNS) <= set(header) and before.endswith("\n"):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, line_of(header, cells).encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = [*COLUMNS, *(name for name in header if name not in COLUMNS)]
        names = dict(zip(header, header, strict=True))
        whole.write_text(self.path, "".join(line_of(header, line) for line in (names, *lines, cells)))


def content_of(text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Header and lines of a file, as they are; a last line that was cut short is none."""
    reader = csv.DictReader(lines_of(text))
    header, lines = list(reader.fieldnames or []), list(reader)
    whole_lines = text.endswith("\n")
    if lines and not whole_lines and None in lines[-1].values():
        lines.pop()
    cut_header = not whole_lines and ",".join(COLUMNS).startswith(text)
    return ([], []) if cut_header else (header, lines)


def line_of(header: list[str], cells: dict[str, str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([cells.get(name) or "" for name in header])
    return buffer.getvalue()


def values_of(row: Row) -> list[str]:
    """As text: losses to 5 digits behind the point, other fractions to 6 digits."""
    found = []
    for name in COLUMNS:
        value = getattr(row, name)
        if isinstance(value, float):
            value = f"{value:.5f}" if name.endswith("_loss") else f"{value:.6g}"
        found.append("" if value is None else str(value))
    return found


def parsed(path: Path, number: int, line: dict[str, str]) -> Row:
    """One line; a column that an earlier version did not have is empty.

    Raises:
        ValueError: a value that is none of its column's.
    """
    values: dict[str, typing.Any] = {}
    for name, kind in TYPES.items():
        text = line.get(name) or ""
        optional = isinstance(kind, types.UnionType)
        plain = next(part for part in typing.get_args(kind) if part is not type(None)) if optional else kind
        try:
            values[name] = None if optional and not text else plain(text)
        except ValueError:
            raise ValueError(
                f"{path}:{number}: column {name} holds {text!r}, which is no {plain.__name__}: mend or delete the line"
            ) from None
    return Row(**values)
