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

from slope_megatron.config.text_file import decode
from slope_megatron.data.compressed import opened
from slope_megatron.data.folder import FolderScan
from slope_megatron.data.formats import Layout, choose, layout_of
from slope_megatron.data.hub import hub_documents
from slope_megatron.data.records import BadRecords, Tally, read_records
from slope_megatron.data.settings import PrepareSettings

# Nobody wrote a file of this size by hand; in a standard library it would be a table.
MAX_STDLIB_FILE = 10_000_000
SOURCES = "stdlib, a folder, a text file, a .jsonl, .json or .parquet file (packed or not), or hf:NAME[:CONFIG]"
# Reasons for which documents are passed over here, whatever the source.
EMPTY, TOO_LONG = "empty", "over the byte limit"

Documents = Iterator[tuple[str, str]]
Files = list[tuple[str, Path, Layout]]
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Source:
    """Documents to read, and what was passed over while reading them."""

    spec: str
    # What a document's split follows from. Records have no name that would outlive a reshuffle: there, the text.
    split_by: str
    # (count of what is met and passed over, rows to leave out at the start) -> documents.
    read: Callable[[Tally, int], Documents]
    # Longer documents are passed over; 0: none is.
    max_bytes: int
    # The local folder that is read, for those who must not write into it.
    folder: Path | None = None
    # What is read: size and time of each tell whether it changed between two readings. None: nothing local.
    files: list[Path] | None = None
    # Whether `read` can leave rows out without reading them.
    seeks: bool = False
    tally: Tally = dataclasses.field(default_factory=Tally)

    @property
    def skipped(self) -> collections.Counter:
        """Reason -> files, links or records passed over; complete once `documents` is exhausted."""
        return self.tally.skipped

    def documents(self, start: int = 0, skipped: dict[str, int] | None = None) -> Documents:
        """Yield `(name, text)`; names are unique, texts are not empty.

        Args:
            start: documents to leave out: an earlier reading had them.
            skipped: what that reading had passed over until then.
        Raises:
            ValueError: a bad record (names file and line), an unreachable hub, or no document at all.
        """
        self.tally = Tally()
        if self.seeks and start:
            self.skipped.update(skipped or {})
            rows, drop = start + self.skipped.total(), 0
        else:
            rows, drop = 0, start
        self.tally.met = rows
        kept = start - drop
        for name, text in self.read(self.tally, rows):
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
        self.tally.check(documents=kept)
        if not kept:
            passed = f" (passed over: {describe_skipped(self.skipped)})" if self.skipped else ""
            raise ValueError(f"source {self.spec} holds no text{passed}: give one of {SOURCES}, with text in it")

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


def open_source(spec: str, settings: PrepareSettings) -> Source:
    """The source that `spec` names; nothing is read yet."""
    if spec == "stdlib":
        return _stdlib(settings)
    if spec.startswith("hf:"):
        name, _, config = spec[len("hf:") :].partition(":")
        if not name:
            raise ValueError(f"source {spec!r} names no dataset: write hf:NAME or hf:NAME:CONFIG")

        def stream(tally: Tally, start: int) -> Documents:
            bad = BadRecords(settings.bad_records == "refuse", tally)
            return hub_documents(name, config or None, settings.text_key, bad, start)

        return Source(spec, "text", stream, settings.max_document_bytes, seeks=True)
    path = Path(spec)
    if path.is_dir():
        found = FolderScan(path)
        files, passed = choose(found.files, spec, settings.format, settings.include)
        return _files(spec, files, found.passed + passed, settings, folder=path)
    if not path.is_file():
        raise ValueError(f"source {spec} does not exist: give {SOURCES}")
    layout = layout_of(path, settings.format)
    if layout.format == "other":
        raise ValueError(f"source {spec} is of no format that is read ({layout.suffix}): give {SOURCES}")
    return _files(spec, [(path.name, path, layout)], collections.Counter(), settings)


def _files(
    spec: str, files: Files, passed: collections.Counter, settings: PrepareSettings, folder: Path | None = None
) -> Source:
    """Local files of one format; `passed`: reason -> what of the folder is not among them."""
    records = any(layout.format != "text" for _, _, layout in files)

    def read(tally: Tally, _: int) -> Documents:
        for reason, count in passed.items():
            tally.pass_over(reason, count)
        if records:
            return read_records(files, settings.text_key, BadRecords(settings.bad_records == "refuse", tally))
        return _texts(files, tally)

    paths = [path for _, path, _ in files]
    split_by = "text" if records else "name"
    return Source(spec, split_by, read, settings.max_document_bytes, folder=folder, files=paths)


def _stdlib(settings: PrepareSettings) -> Source:
    """The source text of the running Python's standard library, tests included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = FolderScan(root, frozenset({"site-packages", "dist-packages", "__pycache__"}))
    files = [(name, path, Layout("text", ".py")) for name, path in found.files if path.suffix == ".py"]

    def read(tally: Tally, _: int) -> Documents:
        for reason, count in found.passed.items():
            tally.pass_over(reason, count)
        if others := len(found.files) - len(files):
            tally.pass_over("no .py file", others)
        return _texts(files, tally, limit=MAX_STDLIB_FILE)

    paths = [path for _, path, _ in files]
    return Source("stdlib", "name", read, settings.max_document_bytes, folder=root, files=paths)


def _texts(files: Files, tally: Tally, limit: int | None = None) -> Documents:
    """One document per file. Decoded from bytes, so that line ends stay what they are."""
    for name, path, layout in files:
        tally.met += 1
        if not os.access(path, os.R_OK):
            tally.skipped["unreadable"] += 1
            continue
        with opened(path, layout.compressed) as file:
            content = file.read()
        if limit is not None and len(content) > limit:
            tally.skipped[f"over {limit // 1_000_000} MB"] += 1
            continue
        try:
            text = decode(content)
        except UnicodeDecodeError:
            tally.skipped["binary" if b"\0" in content else "not UTF-8"] += 1
            continue
        if "\0" in text:
            tally.skipped["binary"] += 1
        else:
            yield name, text
