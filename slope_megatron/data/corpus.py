"""A source read once, into parts of text that are whole or not there: a killed reading goes on behind the last one.

A stream cannot be read twice, and files may change between two readings; the parts do neither.

Legend: D documents.
"""

import dataclasses
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from slope_megatron.data.scratch import sealed_folder
from slope_megatron.data.sources import Source
from slope_megatron.data.splits import split_key
from slope_megatron.storage import whole

# Bytes of text in a part: some seconds of one worker.
PART = 16_000_000
DUPLICATE = "duplicate"
DIGEST = 16


@dataclasses.dataclass(frozen=True)
class TextPart:
    """Documents one after the other in `folder/text`, and their lengths in bytes."""

    folder: Path
    bytes_D: np.ndarray

    def texts(self) -> Iterator[str]:
        """The documents' texts, in order."""
        with (self.folder / "text").open("rb") as file:
            for size in self.bytes_D:
                yield file.read(int(size)).decode()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All documents of one source."""

    parts: list[TextPart]
    # Positions of the documents in [0, 1), from which the splits follow.
    keys_D: np.ndarray
    # Of all texts in order, and of their names where the splits follow those.
    sha256: str
    # reason -> documents passed over.
    skipped: dict[str, int]

    @property
    def bytes_D(self) -> np.ndarray:
        return np.concatenate([part.bytes_D for part in self.parts])

    @property
    def bytes(self) -> int:
        return int(sum(part.bytes_D.sum() for part in self.parts))

    def texts(self) -> Iterator[str]:
        return itertools.chain.from_iterable(part.texts() for part in self.parts)


@dataclasses.dataclass
class Progress:
    """How far a reading is, for the one that goes on; kept with each part."""

    read: int = 0
    # As in Corpus.
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    duplicates: int = 0


class _PartWriter:
    """Collects documents and seals a part when it is full."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        self.texts: list[bytes] = []
        self.size = 0
        self.keys, self.digests = array("d"), bytearray()

    def add(self, content: bytes, key: float, digest: bytes) -> None:
        self.texts.append(content)
        self.size += len(content)
        self.keys.append(key)
        self.digests += digest

    def seal(self, progress: Progress) -> None:
        with sealed_folder(self.folder / f"{self.number:06}") as partial:
            (partial / "text").write_bytes(b"".join(self.texts))
            np.save(partial / "bytes.npy", np.array([len(text) for text in self.texts], dtype=np.int64))
            np.save(partial / "keys.npy", np.array(self.keys))
            np.save(partial / "digests.npy", np.frombuffer(bytes(self.digests), dtype=np.uint8).reshape(-1, DIGEST))
            (partial / "progress.json").write_text(json.dumps(dataclasses.asdict(progress)))


def read_corpus(
    source: Source,
    folder: Path,
    *,
    max_documents: int | None,
    deduplicate: bool,
    seen: set[bytes],
    advance: Callable[[int], object],
) -> Corpus:
    """Copy the source's documents to parts in `folder`, or go on behind those that are there.

    Args:
        max_documents: read the first so many.
        deduplicate: keep the first of several equal texts.
        seen: digests of the texts that earlier sources gave; this one's are added.
        advance: called with the bytes of each document.
    Raises:
        ValueError: what `Source.documents` raises.
    """
    folder.mkdir(exist_ok=True)
    finished = folder / "finished.json"
    parts = sealed_parts(folder)
    progress = Progress()
    if parts:
        progress = Progress(**json.loads((parts[-1] / "progress.json").read_text()))
    if deduplicate:
        seen.update(digest.tobytes() for part in parts for digest in np.load(part / "digests.npy"))
    if not finished.is_file():
        documents = source.documents(progress.read, progress.skipped)
        if max_documents is not None:
            documents = itertools.islice(documents, max(0, max_documents - progress.read))
        _write_parts(documents, source, folder, len(parts), progress, seen if deduplicate else None, advance)
        skipped = dict(source.skipped)
        if progress.duplicates:
            skipped[DUPLICATE] = progress.duplicates
        kept = sum(len(np.load(part / "bytes.npy")) for part in sealed_parts(folder))
        assert progress.read == kept + progress.duplicates, f"{progress.read} read, {kept} kept, {progress.duplicates}"
        whole.write_json(finished, skipped)
    return _open_corpus(folder, json.loads(finished.read_text()))


def sealed_parts(folder: Path) -> list[Path]:
    """The finished parts of a folder, in order."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit())


def _write_parts(documents, source: Source, folder: Path, first: int, progress: Progress, seen, advance) -> None:
    by_text = source.split_by == "text"
    writer = _PartWriter(folder, first)
    for name, text in documents:
        progress.read += 1
        content = text.encode()
        digest = hashlib.blake2b(content, digest_size=DIGEST).digest()
        advance(len(content))
        if seen is not None:
            if digest in seen:
                progress.duplicates += 1
                continue
            seen.add(digest)
        writer.add(content, split_key(text if by_text else name), digest)
        if writer.size >= PART:
            writer.seal(dataclasses.replace(progress, skipped=dict(source.skipped)))
            writer = _PartWriter(folder, writer.number + 1)
    if writer.texts:
        writer.seal(dataclasses.replace(progress, skipped=dict(source.skipped)))


def _open_corpus(folder: Path, skipped: dict[str, int]) -> Corpus:
    folders = sealed_parts(folder)
    parts = [TextPart(part, np.load(part / "bytes.npy")) for part in folders]
    keys_D = np.concatenate([np.load(part / "keys.npy") for part in folders]) if folders else np.zeros(0)
    digest = hashlib.sha256()
    for part in folders:
        # A text's digest and its position, which stands for the name where the splits follow names.
        positions = np.load(part / "keys.npy").astype("<f8").view(np.uint8).reshape(-1, 8)
        digest.update(np.hstack([np.load(part / "digests.npy"), positions]).tobytes())
    return Corpus(parts, keys_D, digest.hexdigest(), dict(sorted(skipped.items())))
