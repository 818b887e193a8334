"""Where text comes from: each source yields documents `(name, text)`, in the same order every time."""

import collections
import dataclasses
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from slope_megatron.data.hub import hub_documents

# Nobody wrote a file of this size by hand; in a standard library it would be a table.
MAX_STDLIB_FILE = 10_000_000
FORMS = "stdlib, a folder of text, a text file, a .jsonl file, or hf:NAME[:CONFIG]"

Documents = Iterator[tuple[str, str]]


@dataclasses.dataclass
class Source:
    """Documents to read, and what was passed over while reading them."""

    spec: str
    # What a document's split follows from. Records have no name that would outlive a reshuffle: there, the text.
    split_by: str
    read: Callable[[collections.Counter], Documents]
    # The local folder that is read, for those who must not write into it.
    folder: Path | None = None
    # reason -> files or records passed over; complete once `documents` is exhausted.
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def documents(self) -> Documents:
        """Yield `(name, text)`; names are unique, texts are not empty.

        Raises:
            ValueError: a bad record (names file and line), an unreachable hub, or no document at all.
        """
        self.skipped.clear()
        found = False
        for name, text in self.read(self.skipped):
            if text:
                found = True
                yield name, text
            else:
                self.skipped["empty"] += 1
        if not found:
            passed = f" (passed over: {describe_skipped(self.skipped)})" if self.skipped else ""
            raise ValueError(f"source {self.spec} holds no text{passed}: give one of {FORMS}, with text in it")


def describe_skipped(skipped: collections.Counter) -> str:
    """`{"empty": 2, "not UTF-8": 1}` -> `"2 empty, 1 not UTF-8"`."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def open_source(spec: str, text_key: str = "text") -> Source:
    """The source that `spec` names; nothing is read yet.

    Raises:
        ValueError: no such file or folder, or not of a known form.
    """
    if spec == "stdlib":
        return _stdlib()
    if spec.startswith("hf:"):
        name, _, config = spec[len("hf:") :].partition(":")
        if not name:
            raise ValueError(f"source {spec!r} names no dataset: write hf:NAME or hf:NAME:CONFIG")
        return Source(spec, "text", lambda skipped: hub_documents(name, config or None, text_key))
    path = Path(spec)
    if path.is_dir():
        return _folder(spec, path, text_key)
    if not path.is_file():
        raise ValueError(f"source {spec} does not exist: give {FORMS}")
    if path.suffix == ".jsonl":
        return Source(spec, "text", lambda skipped: _records([path], text_key))
    return Source(spec, "name", lambda skipped: _texts([(path.name, path)], skipped))


def _stdlib() -> Source:
    """The source text of the running Python's standard library, tests included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "__pycache__"}

    def read(skipped):
        files = [(name, path) for name, path in _walk(root, outside) if path.suffix == ".py"]
        return _texts(files, skipped, limit=MAX_STDLIB_FILE)

    return Source("stdlib", "name", read, folder=root)


def _folder(spec: str, root: Path, text_key: str) -> Source:
    """All text files below `root`; where every file is a .jsonl, the records of all of them."""
    files = list(_walk(root, {"__pycache__"}))
    if files and all(path.suffix == ".jsonl" for _, path in files):
        paths = [path for _, path in files]
        return Source(spec, "text", lambda skipped: _records(paths, text_key), folder=root)
    return Source(spec, "name", lambda skipped: _texts(files, skipped), folder=root)


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


def _records(paths: list[Path], text_key: str) -> Documents:
    """One document per line; blank lines are nothing."""
    for path in paths:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path.name}:{number}", _text_of(line, text_key, f"{path}:{number}")


def _text_of(line: bytes, text_key: str, where: str) -> str:
    way_out = f'every line must be like {{"{text_key}": "..."}}; another key is named with --text-key'
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError(f"{where} is no JSON: {way_out}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {type(record).__name__}, no object: {way_out}")
    if text_key not in record:
        raise ValueError(f"{where} has no key {text_key!r} (it has {', '.join(record) or 'none'}): {way_out}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{where} has {text!r:.40} under {text_key!r}, no string: {way_out}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half a surrogate pair, which is no character: {way_out}") from None
    return text
