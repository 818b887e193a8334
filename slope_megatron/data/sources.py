"""Where text comes from: each source yields documents `(name, text)`, in the same order every time."""

import collections
import dataclasses
import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from slope_megatron.data.hub import hub_documents
from slope_megatron.data.records import BadRecords, holds_records, read_records

# Nobody wrote a file of this size by hand; in a standard library it would be a table.
MAX_STDLIB_FILE = 10_000_000
FORMS = "stdlib, a folder of text, a text file, a .jsonl or .parquet file, or hf:NAME[:CONFIG]"
# Reasons for which documents are passed over here, whatever the source.
EMPTY, TOO_LONG = "empty", "over the byte limit"

Documents = Iterator[tuple[str, str]]
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Source:
    """Documents to read, and what was passed over while reading them."""

    spec: str
    # What a document's split follows from. Records have no name that would outlive a reshuffle: there, the text.
    split_by: str
    # (counts of what is passed over, rows to leave out at the start) -> documents.
    read: Callable[[collections.Counter, int], Documents]
    # The local folder that is read, for those who must not write into it.
    folder: Path | None = None
    # What is read: size and time of each tell whether it changed between two readings. None: nothing local.
    files: list[Path] | None = None
    # Whether `read` can leave rows out without reading them.
    seeks: bool = False
    max_bytes: int = 0
    # reason -> files or records passed over; complete once `documents` is exhausted.
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def documents(self, start: int = 0, skipped: dict[str, int] | None = None) -> Documents:
        """Yield `(name, text)`; names are unique, texts are not empty.

        Args:
            start: documents to leave out: an earlier reading had them.
            skipped: what that reading had passed over until then.
        Raises:
            ValueError: a bad record (names file and line), an unreachable hub, or no document at all.
        """
        self.skipped.clear()
        if self.seeks and start:
            self.skipped.update(skipped or {})
            rows, drop = start + self.skipped.total(), 0
        else:
            rows, drop = 0, start
        kept = start - drop
        for name, text in self.read(self.skipped, rows):
            if not text:
                self.skipped[EMPTY] += 1
            elif self.max_bytes and len(text) * 4 > self.max_bytes and len(text.encode()) > self.max_bytes:
                self.skipped[TOO_LONG] += 1
                if self.skipped[TOO_LONG] == 1:
                    logger.warning("passed over: %s in %s has %d characters", name, self.spec, len(text))
            else:
                kept += 1
                if kept > drop:
                    yield name, text
        if not kept:
            passed = f" (passed over: {describe_skipped(self.skipped)})" if self.skipped else ""
            raise ValueError(f"source {self.spec} holds no text{passed}: give one of {FORMS}, with text in it")

    def fingerprint(self) -> str:
        """Of the files' names, sizes and times: whether what was read so far still holds."""
        digest = hashlib.sha256(self.spec.encode())
        for path in self.files or ():
            try:
                status = path.stat()
            except OSError:
                continue
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def parse_specs(specs: Iterable[str]) -> tuple[list[str], list[float] | None]:
    """`["a=0.7", "b=0.3"]` -> (["a", "b"], [0.7, 0.3]); None where no weights are given.

    Raises:
        ValueError: weights for some of the sources only, or one that is not positive.
    """
    names, weights = [], []
    for spec in specs:
        match = re.fullmatch(r"(.+)=([0-9.eE+-]+)", spec)
        if match and not Path(spec).exists():
            try:
                weights.append(float(match[2]))
            except ValueError:
                raise ValueError(f"source {spec!r} has no number behind the =: write it as corpus.jsonl=0.7") from None
            if not 0 < weights[-1] < float("inf"):
                raise ValueError(f"source {spec!r} has weight {weights[-1]}: it must be positive")
            names.append(match[1])
        else:
            names.append(spec)
    if weights and len(weights) != len(names):
        raise ValueError(
            f"{len(weights)} of the {len(names)} sources have a weight: give each one, as in a.jsonl=0.7 b.jsonl=0.3"
        )
    return names, weights or None


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """`{"empty": 2, "not UTF-8": 1}` -> `"2 empty, 1 not UTF-8"`."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def open_source(
    spec: str, text_key: str = "text", *, refuse_bad_records: bool = True, max_document_bytes: int = 0
) -> Source:
    """The source that `spec` names; nothing is read yet.

    Raises:
        ValueError: no such file or folder, or not of a known form.
    """
    source = _open(spec, text_key, refuse_bad_records)
    source.max_bytes = max_document_bytes
    return source


def _open(spec: str, text_key: str, refuse: bool) -> Source:
    if spec == "stdlib":
        return _stdlib()
    if spec.startswith("hf:"):
        name, _, config = spec[len("hf:") :].partition(":")
        if not name:
            raise ValueError(f"source {spec!r} names no dataset: write hf:NAME or hf:NAME:CONFIG")

        def stream(skipped: collections.Counter, start: int) -> Documents:
            return hub_documents(name, config or None, text_key, BadRecords(refuse, skipped), start)

        return Source(spec, "text", stream, seeks=True)
    path = Path(spec)
    if path.is_dir():
        return _folder(spec, path, text_key, refuse)
    if not path.is_file():
        raise ValueError(f"source {spec} does not exist: give {FORMS}")
    if holds_records(path):
        return _records(spec, [path], text_key, refuse)
    return Source(spec, "name", lambda skipped, _: _texts([(path.name, path)], skipped), files=[path])


def _records(spec: str, paths: list[Path], text_key: str, refuse: bool, folder: Path | None = None) -> Source:
    def read(skipped: collections.Counter, _: int) -> Documents:
        return read_records(paths, text_key, BadRecords(refuse, skipped))

    return Source(spec, "text", read, folder=folder, files=paths)


def _stdlib() -> Source:
    """The source text of the running Python's standard library, tests included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "__pycache__"}
    files = [(name, path) for name, path in _walk(root, outside) if path.suffix == ".py"]
    return Source(
        "stdlib",
        "name",
        lambda skipped, _: _texts(files, skipped, limit=MAX_STDLIB_FILE),
        folder=root,
        files=[path for _, path in files],
    )


def _folder(spec: str, root: Path, text_key: str, refuse: bool) -> Source:
    """All text files below `root`; where every file holds records, the records of all of them."""
    files = list(_walk(root, {"__pycache__"}))
    paths = [path for _, path in files]
    if files and all(map(holds_records, paths)):
        return _records(spec, paths, text_key, refuse, folder=root)
    return Source(spec, "name", lambda skipped, _: _texts(files, skipped), folder=root, files=paths)


def _walk(root: Path, outside: set[str]) -> list[tuple[str, Path]]:
    """`(relative name, path)` of every file below `root`, hidden ones left out, sorted by name."""
    found: list[tuple[str, Path]] = []
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if child not in outside and not child.startswith(".")]
        paths = [Path(folder, file) for file in files if not file.startswith(".")]
        found.extend((path.relative_to(root).as_posix(), path) for path in paths)
    return sorted(found)


def _texts(files: list[tuple[str, Path]], skipped: collections.Counter, limit: int | None = None) -> Documents:
    """One document per file. Decoded from bytes, so that line ends stay what they are."""
    for name, path in files:
        try:
            content = path.read_bytes()
        except OSError:
            skipped["unreadable"] += 1
            continue
        if limit is not None and len(content) > limit:
            skipped[f"over {limit // 1_000_000} MB"] += 1
        elif b"\0" in content:
            skipped["binary"] += 1
        else:
            try:
                yield name, content.decode()
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1
