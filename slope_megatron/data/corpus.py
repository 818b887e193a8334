"""A source read once: its documents in one scratch file, with what the splits, the manifest and a rerun need to know.

A stream cannot be read twice, and files may change between two readings; the scratch file does neither.
"""

import dataclasses
import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from slope_megatron.data.sources import Source
from slope_megatron.data.splits import split_key


@dataclasses.dataclass(frozen=True)
class Corpus:
    """D documents, one after the other in `path`."""

    path: Path
    bytes_D: np.ndarray
    keys_D: np.ndarray
    # Of all texts in order, and of their names where the splits follow those.
    sha256: str

    @property
    def bytes(self) -> int:
        return int(self.bytes_D.sum())

    def texts(self) -> Iterator[str]:
        """The documents' texts, in order."""
        with self.path.open("rb") as file:
            for size in self.bytes_D:
                yield file.read(int(size)).decode()


def read_corpus(source: Source, path: Path, max_documents: int | None, advance: Callable[[int], object]) -> Corpus:
    """Copy the source's documents to `path`; `advance(bytes)` is called after each.

    Raises:
        ValueError: what `Source.documents` raises.
    """
    sizes, keys = array("q"), array("d")
    digest = hashlib.sha256()
    by_text = source.split_by == "text"
    with path.open("wb") as file:
        for name, text in itertools.islice(source.documents(), max_documents):
            content = text.encode()
            file.write(content)
            sizes.append(len(content))
            keys.append(split_key(text if by_text else name))
            # A record's name only says where it lay. Lengths keep two corpora from running together to the same bytes.
            for part in (content,) if by_text else (name.encode("utf-8", "surrogatepass"), content):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
            advance(len(content))
    return Corpus(path, np.array(sizes), np.array(keys), digest.hexdigest())
