"""Records: files that hold many documents each, a line of JSON or a row of Parquet."""

import collections
import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path

JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
PARQUET = (".parquet",)
# Bad records that are shown one by one; the others are counted.
SHOWN = 3

logger = logging.getLogger(__name__)


class BadRecord(Exception):
    """A record without text: `kind` for the count, the message for the reader."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class BadRecords:
    """What happens to bad records: the first one ends it, or each is counted, and the first few shown."""

    def __init__(self, refuse: bool, skipped: collections.Counter):
        self.refuse = refuse
        self.skipped = skipped
        self.seen = 0

    def meet(self, bad: BadRecord) -> None:
        """Raises ValueError where bad records are refused."""
        if self.refuse:
            raise ValueError(f"{bad}; to pass such records over: --bad-records skip") from None
        self.seen += 1
        if self.seen <= SHOWN:
            logger.warning("passed over: %s", bad)
        self.skipped[bad.kind] += 1


def holds_records(path: Path) -> bool:
    return path.name.endswith(JSON_LINES + PARQUET)


def read_records(paths: list[Path], text_key: str, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """Yield `(file:number, text)` of every record; blank lines are nothing.

    Raises:
        ValueError: a file that cannot be read, or a record without text (if those are refused).
    """
    for path in paths:
        reader = _parquet_rows if path.name.endswith(PARQUET) else _json_lines
        yield from reader(path, text_key, bad)


def _json_lines(path: Path, text_key: str, bad: BadRecords) -> Iterator[tuple[str, str]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = _text_of_line(line, text_key, f"{path}:{number}")
                except BadRecord as failure:
                    bad.meet(failure)
                else:
                    yield f"{path.name}:{number}", text
    except (gzip.BadGzipFile, EOFError) as failure:
        raise ValueError(f"{path} is cut or no gzip file ({failure}): fetch it again") from failure


def _text_of_line(line: bytes, text_key: str, where: str) -> str:
    way_out = f'every line must be like {{"{text_key}": "..."}}; another key is named with --text-key'
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8", f"{where} is no JSON in UTF-8: {way_out}") from None
    except (ValueError, RecursionError):
        raise BadRecord("no JSON", f"{where} is no JSON: {way_out}") from None
    if not isinstance(record, dict):
        raise BadRecord("no object", f"{where} is a JSON {type(record).__name__}, no object: {way_out}")
    if text_key not in record:
        raise BadRecord(
            "no text key", f"{where} has no key {text_key!r} (it has {', '.join(record) or 'none'}): {way_out}"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise BadRecord("no string", f"{where} has {text!r:.40} under {text_key!r}, no string: {way_out}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(
            "half a surrogate pair", f"{where} holds half a surrogate pair, which is no character: {way_out}"
        ) from None
    return text


def _parquet_rows(path: Path, text_key: str, bad: BadRecords) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as failure:
        raise ValueError(f"{path} is no Parquet file, or is cut ({failure}): fetch it again") from failure
    with file:
        columns = file.schema_arrow.names
        if text_key not in columns:
            raise ValueError(
                f"{path} has no column {text_key!r} (it has {', '.join(columns)}): name the text column with --text-key"
            )
        number = 0
        for batch in _parquet_batches(path, file, text_key):
            for value in batch.column(0):
                try:
                    text = _text_of_cell(value, f"{path}:{number}", text_key)
                except BadRecord as failure:
                    bad.meet(failure)
                else:
                    yield f"{path.name}:{number}", text
                number += 1


def _parquet_batches(path: Path, file, text_key: str):
    import pyarrow

    try:
        yield from file.iter_batches(batch_size=1024, columns=[text_key])
    except (pyarrow.ArrowException, OSError) as failure:
        raise ValueError(f"{path} cannot be read to its end ({failure}): fetch it again") from failure


def _text_of_cell(value, where: str, text_key: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8", f"row {where} is not UTF-8: mend the file") from None
    if not isinstance(text, str):
        raise BadRecord(
            "no string",
            f"row {where} has {text!r:.40} in column {text_key!r}, no string: name the text column with --text-key",
        )
    return text
