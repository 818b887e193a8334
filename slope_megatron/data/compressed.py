"""Files opened as what they hold, unpacked while they are read; and the one sentence about a damaged file."""

import bz2
import contextlib
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

UNPACK: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
AGAIN = "fetch it again"


@contextlib.contextmanager
def opened(path: Path, compressed: str) -> Iterator[BinaryIO]:
    """A file's content, unpacked (`compressed` as in `Layout`); see `damage_named` for what reading it may raise."""
    with damage_named(path), _open(path, compressed) as file:
        yield file


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what a decompressor, Arrow or the file system raises into a ValueError with the file's name."""
    try:
        yield
    except Exception as error:
        # Arrow's and the decompressors' own failures have no errno; the system's have one.
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{path} cannot be read ({error.strerror}): make it readable, or {AGAIN}") from error
        if isinstance(error, (OSError, EOFError, zlib.error, lzma.LZMAError, *_arrow_errors())):
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise ValueError(f"{path} is damaged or cut ({reason}): {AGAIN}") from error
        raise


def _arrow_errors() -> tuple[type[Exception], ...]:
    """Arrow's own, if it has been loaded: reading JSON does without."""
    return (sys.modules["pyarrow"].ArrowException,) if "pyarrow" in sys.modules else ()


def _open(path: Path, compressed: str) -> BinaryIO:
    if not compressed:
        return path.open("rb")
    if path.stat().st_size == 0:
        raise EOFError("it is empty")
    if compressed == ".zst":
        return _open_zstd(path)
    return UNPACK[compressed](path, "rb")


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import pyarrow

        if not pyarrow.Codec.is_available("zstd"):
            raise ImportError
    except ImportError:
        raise ValueError(
            f"{path} is packed with zstd, which needs pyarrow with its codec: pip install pyarrow, or unpack the file"
        ) from None
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
