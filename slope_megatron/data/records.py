"""Records: files that hold many documents each, a line of JSON, an entry of a JSON array, or a row of Parquet."""

import collections
import contextlib
import dataclasses
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from slope_megatron.config.text_file import decode, encoding_of, not_text
from slope_megatron.data.compressed import opened
from slope_megatron.data.formats import Layout

# Bad records that are shown one by one; the others are counted.
SHOWN = 3

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Tally:
    """Each file, link, left-out folder or record that is met counts once: as a document, or under the reason why not.

    Args:
        met: all of them.
        skipped: reason -> those that are no documents.
    """

    met: int = 0
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def pass_over(self, reason: str, count: int) -> None:
        """Count what is met and passed over at once."""
        self.met += count
        self.skipped[reason] += count

    def check(self, documents: int) -> None:
        passed = self.skipped.total()
        assert self.met == documents + passed, f"{self.met} read, {documents} documents and {passed} passed over"


class BadRecord(Exception):
    """A record that is of no use: `kind` for the count, the message for the reader."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass
class BadRecords:
    """What happens to bad records: the first one ends it, or each is counted, and the first few shown."""

    refuse: bool
    tally: Tally
    seen: int = 0

    def meet(self, bad: BadRecord) -> None:
        """Raises ValueError where bad records are refused."""
        if self.refuse:
            raise ValueError(f"{bad}; to pass such records over: --bad-records skip") from None
        self.seen += 1
        if self.seen <= SHOWN:
            logger.warning("passed over: %s", bad)
        self.tally.skipped[bad.kind] += 1


def read_records(
    files: Iterable[tuple[str, Path, Layout]], text_key: str, bad: BadRecords
) -> Iterator[tuple[str, str]]:
    """Yield `(file:number, text)` of every record; blank lines are nothing.

    Args:
        files: name, path and layout of each.
    Raises:
        ValueError: a file that cannot be read, or a record without text (if those are refused).
    """
    way_out = f'every line must be like {{"{text_key}": "..."}}; another key is named with --text-key'
    for name, path, layout in files:
        for number, row in read_rows(path, layout, way_out, [text_key]):
            bad.tally.met += 1
            try:
                text = _text_of(row, text_key, f"{path}:{number}", way_out)
            except BadRecord as failure:
                bad.meet(failure)
            else:
                yield f"{name}:{number}", text


def read_rows(
    path: Path, layout: Layout, way_out: str, columns: list[str] | None = None
) -> Iterator[tuple[int, dict | BadRecord]]:
    """Yield each record of a file with its number: lines and entries from 1, rows of Parquet from 0.

    Args:
        way_out: what to do about a line that is no JSON object.
        columns: those of a Parquet file that are wanted (default: all).
    Raises:
        ValueError: the file is damaged or cut, is no JSON array where it begins as one, or lacks a column.
    """
    with opened(path, layout.compressed) as file:
        if layout.format == "parquet":
            with _seekable(file, layout.compressed) as whole:
                yield from _parquet_rows(path, whole, columns)
            return
        for number, line in _json_lines(path, file, layout.suffix in (".jsonl", ".ndjson")):
            try:
                yield number, _object_of(line, f"{path}:{number}", way_out)
            except BadRecord as failure:
                yield number, failure


def _json_lines(path: Path, file: BinaryIO, only_lines: bool) -> Iterator[tuple[int, object]]:
    """Yield each line that is not blank, or each entry of the array, or the one object, that the file is."""
    numbered = enumerate(_lines(path, file), 1)
    lines: Iterator[tuple[int, bytes]] = ((number, line) for number, line in numbered if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if not only_lines and _begins_a_whole(first[1]):
        # Held in memory at once.
        held = [first, *lines]
        try:
            content = json.loads(decode(b"".join(line for _, line in held)))
        except (ValueError, RecursionError) as error:
            if not first[1].lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
                raise ValueError(f"{path} begins as a JSON array and is none ({error}): mend it") from None
            lines = iter(held[1:])
        else:
            yield from enumerate(content if isinstance(content, list) else [content], 1)
            return
    yield first
    yield from lines


def _begins_a_whole(line: bytes) -> bool:
    """Whether a first line begins an array, or an object that it does not end."""
    text = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"{"):
        return text.startswith(b"[")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return True
    return False


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Lines in UTF-8 that end at a line feed, whatever the encoding that the file's mark tells."""
    encoding, _ = encoding_of(file.peek(4)[:4])  # type: ignore[attr-defined]  # whatever `opened` gives can
    if encoding == "utf-8":
        yield from file
        return
    try:
        for number, line in enumerate(io.TextIOWrapper(file, encoding, newline="\n")):
            yield (line.removeprefix("\ufeff") if number == 0 else line).encode()
    except UnicodeDecodeError as error:
        raise ValueError(not_text(path, error)) from None


def _object_of(line, where: str, way_out: str) -> dict:
    """A record of a line, or of an entry that has been read already."""
    record = line
    if isinstance(line, bytes):
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise BadRecord("not UTF-8", f"{where} is no JSON in UTF-8: {way_out}") from None
        except (ValueError, RecursionError):
            raise BadRecord("no JSON", f"{where} is no JSON: {way_out}") from None
    if not isinstance(record, dict):
        raise BadRecord("no object", f"{where} is a JSON {type(record).__name__}, no object: {way_out}")
    return record


@contextlib.contextmanager
def _seekable(file: BinaryIO, compressed: str) -> Iterator[BinaryIO]:
    """The file, or one on disk with what a packed one holds: Parquet is read from its end."""
    if not compressed:
        yield file
        return
    with tempfile.TemporaryFile() as whole:
        shutil.copyfileobj(file, whole)
        whole.seek(0)
        yield whole


def _parquet_rows(path: Path, file: BinaryIO, columns: list[str] | None) -> Iterator[tuple[int, dict | BadRecord]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
        there = table.schema_arrow.names
        lacking = [name for name in columns or () if name not in there]
        if lacking:
            raise ValueError(
                f"{path} has no column {lacking[0]!r} (it has {', '.join(there)}): name the text column with --text-key"
            )
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            names = batch.schema.names
            for cells in zip(*batch.columns, strict=True):
                try:
                    row: dict | BadRecord = {name: cell.as_py() for name, cell in zip(names, cells, strict=True)}
                except UnicodeDecodeError:
                    row = BadRecord("not UTF-8", f"{path}:{number} is not UTF-8: mend the file")
                yield number, row
                number += 1


def _text_of(row: dict | BadRecord, text_key: str, where: str, way_out: str) -> str:
    if isinstance(row, BadRecord):
        raise row
    if text_key not in row:
        raise BadRecord(
            "no text key", f"{where} has no key {text_key!r} (it has {', '.join(row) or 'none'}): {way_out}"
        )
    text = row[text_key]
    if not isinstance(text, str):
        raise BadRecord("no string", f"{where} has {text!r:.40} under {text_key!r}, no string: {way_out}")
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{where} holds half a surrogate pair, which is no character: {way_out}"
        raise BadRecord("half a surrogate pair", message) from None
    return text
