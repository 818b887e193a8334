"""What the name of a file tells: the format of its documents, and how it is compressed.

    text       a document                       .txt, .md, .py, no suffix: whatever is not listed here
    json       a record a line, or an array     .jsonl, .ndjson, .json
    parquet    a record a row                   .parquet
    other      documents in a format that is not read, such as .csv or .zip

Capitals count as small letters. Behind each may stand .gz, .bz2, .xz or .zst.
"""

import collections
import dataclasses
import fnmatch
from pathlib import Path, PurePath

FORMATS = ("text", "json", "parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
RECORDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
# Many documents in one file, or compressed in another way: as text each would be one document of something else.
TABLES = (".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro")
PACKED = (".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4", ".z", ".br")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a file is to be read.

    Args:
        format: one of FORMATS, or "other".
        suffix: in small letters, without the compression's.
        compressed: one of COMPRESSED, or "".
    """

    format: str
    suffix: str
    compressed: str = ""


def layout_of(path: PurePath | str, format: str = "auto") -> Layout:
    """What the name tells; `format`, unless auto, is what the content is whatever the suffix."""
    name = PurePath(path).name.lower()
    compressed = PurePath(name).suffix
    if compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    else:
        compressed = ""
    suffix = PurePath(name).suffix
    told = RECORDS.get(suffix, "other" if suffix in TABLES + PACKED else "text")
    return Layout(told if format == "auto" else format, suffix, compressed)


def choose(
    files: list[tuple[str, Path]], spec: str, format: str, include: str
) -> tuple[list[tuple[str, Path, Layout]], collections.Counter]:
    """The files to read of those in a folder, all of one format, with their layouts; and reason -> files passed over.

    Args:
        files: names and paths.
        spec: the source, for people.
        format: files of another one are passed over; with `include`, those that it names are read as this.
        include: patterns of names, with commas; other files are passed over.
    Raises:
        ValueError: files of several formats, or of none that is read, and nothing says which are meant.
    """
    passed: collections.Counter = collections.Counter()
    chosen = []
    for name, path in files:
        told = layout_of(name)
        if include and not matches(name, include):
            passed["not in --include"] += 1
        elif not include and format not in ("auto", told.format):
            passed["of another format"] += 1
        else:
            chosen.append((name, path, layout_of(name, format)))
    found: dict[str, list[str]] = {}
    for name, _, layout in chosen:
        found.setdefault(layout.format, []).append(name)
    if len(found) > 1 or "other" in found:
        listed = "; ".join(f"{format}: {len(names):,}, such as {names[0]}" for format, names in sorted(found.items()))
        problem = "files of several formats" if len(found) > 1 else "no file of a format that is read"
        raise ValueError(
            f"source {spec} holds {problem} ({listed}): say which are meant with --format {{{','.join(FORMATS)}}} or "
            "--include PATTERN"
        )
    return chosen, passed


def matches(name: str, include: str) -> bool:
    """Whether one of the patterns fits a file's name, or its path below the folder."""
    patterns = [pattern.strip() for pattern in include.split(",")]
    last = name.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns for text in (name, last))
