"""Files of torch's distributed checkpoints, summed while they are written and checked while they are read.

Each holds the tensors of one rank one after the other. Their sums are taken of the bytes on their way to the disk, and
a reader compares those of the tensors that it reads; it never executes what it reads.
"""

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner

from slope_megatron.storage import metadata, sums


class _SummedStream:
    """A file being written, and the sums of what went into it: of all, and of each part between two calls of `tell`.

    torch calls it before and after each tensor.
    """

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.whole, self.part = xxhash.xxh3_128(), xxhash.xxh3_128()
        self.start, self.position = 0, 0
        self.parts: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        """The file's own, but for what is summed."""
        return getattr(self.stream, name)

    def write(self, content) -> int:
        self.whole.update(content)
        self.part.update(content)
        self.position += memoryview(content).nbytes
        return self.stream.write(content)

    def tell(self) -> int:
        if self.position > self.start:
            self.parts[str(self.start)] = self.part.hexdigest()
            self.part.reset()
            self.start = self.position
        return self.position

    def entry(self) -> dict[str, Any]:
        """Of the manifest."""
        return {"bytes": self.position, sums.ALGORITHM: self.whole.hexdigest(), "parts": self.parts}


class _SummingFiles(FileSystem):
    """The file system as torch's writer knows it."""

    def __init__(self) -> None:
        self.entries: dict[str, dict] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            raise ValueError(f"{path} was to be opened with mode {mode!r}: this one writes only")
        with open(path, mode) as stream:
            summed = _SummedStream(stream)
            yield summed
        self.entries[Path(path).name] = summed.entry()


class SummingWriter(checkpoint.FileSystemWriter):
    """torch's writer, one file a rank.

    Attributes:
        entries: of the files that this process wrote, as in a manifest.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder), thread_count=1, sync_files=True, per_thread_copy_ahead=0)
        files = _SummingFiles()
        self.fs, self.entries = files, files.entries


class CheckedReader(checkpoint.FileSystemReader):
    """torch's reader, which compares what it reads with the folder's manifest, and unpickles nothing freely.

    Args:
        way_out: what to do about a folder that is damaged.
        whole_files: hash a file of which the manifest has no parts (older ones) when it is touched first; False: the
            caller has.
    Raises:
        sums.Damaged: the manifest cannot be read.
    """

    def __init__(self, folder: Path | str, way_out: str = sums.COPY_AGAIN, *, whole_files: bool = True):
        super().__init__(str(folder))
        self.folder, self.way_out, self.whole_files = Path(folder), way_out, whole_files
        try:
            self.entries = sums.read_manifest(self.folder)
        except sums.Damaged as error:
            raise self.damaged(str(error)) from None
        if self.entries is None:
            sums.note_absence(self.folder)
        self.checked: set[str] = set()
        self.metadata: Metadata | None = None

    def damaged(self, what: str) -> sums.Damaged:
        return sums.damaged(self.folder, what, self.way_out)

    def read_metadata(self, *_: Any) -> Metadata:
        """
        Raises:
            metadata.Refused: it names something that no checkpoint needs; nothing of it was executed.
            sums.Damaged: it is not what was written.
            ValueError: it is no such file.
        """
        if self.metadata is None:
            path = self.folder / metadata.NAME
            try:
                content = path.read_bytes()
            except OSError as error:
                raise self.damaged(f"{metadata.NAME} cannot be read ({error.strerror})") from None
            expected = (self.entries or {}).get(metadata.NAME)
            if expected and not sums.matches(content, expected):
                raise self.damaged(f"{metadata.NAME} has another checksum")
            self.metadata = metadata.read_metadata(content, path)
            self.metadata.storage_meta = self.metadata.storage_meta or StorageMeta()
            self.metadata.storage_meta.load_id = self.load_id
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner):
        """
        Raises:
            sums.Damaged: what was to be read is missing, or not what was written.
            metadata.Refused: an object in it asks for what is no data.
        """
        try:
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    self.check_object(item.storage_index)
            return super().read_data(plan, planner)
        except torch.OutOfMemoryError:
            raise
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {str(error).splitlines()[0]}"
            name = Path(getattr(error, "filename", None) or "*.distcp").name
            raise self.damaged(f"{name} cannot be read ({reason})") from None

    def _slice_file(self, file: IO[bytes], sinfo) -> IO[bytes]:
        """One tensor's bytes, checked; torch reads every tensor through this."""
        file.seek(sinfo.offset)
        content = file.read(sinfo.length)
        if len(content) != sinfo.length:
            raise self.damaged(f"{sinfo.relative_path} is cut")
        self.check(sinfo.relative_path, sinfo.offset, content)
        return io.BytesIO(content)

    def check(self, name: str, offset: int, content: bytes) -> None:
        """Compare a part of a file."""
        if self.entries is None:
            return
        if name not in self.entries:
            raise self.damaged(f"{name} is in no manifest")
        entry = self.entries[name]
        expected = entry.get("parts", {}).get(str(offset))
        if expected is not None:
            if sums.sum_of(content) != expected:
                raise self.damaged(f"{name} has another checksum in the {len(content)} bytes from {offset} on")
        elif self.whole_files and name not in self.checked:
            if found := sums.difference(self.folder / name, entry):
                raise self.damaged(f"{name} {found}")
            self.checked.add(name)

    def check_object(self, index) -> None:
        """What is no tensor is unpickled by torch's planner: let through what holds plain data only."""
        info = self.storage_data[index]
        with open(self.folder / info.relative_path, "rb") as stream:
            content = self._slice_file(stream, info).read()
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise metadata.Refused(
                f"{self.folder / info.relative_path} holds {index.fqn!r}, which is no plain data ({reason}): nothing "
                "was executed; use a checkpoint whose origin you trust"
            ) from None


def read_tensors(state: dict[str, torch.Tensor], reader: CheckedReader) -> None:
    """Read the tensors of `state` by name, in this process alone; raises what `CheckedReader` does."""
    reader.read_metadata()
    try:
        with warnings.catch_warnings():
            # That one process reads is the intent.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load(state, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise first_cause(error) from None


def first_cause(error: CheckpointException) -> BaseException:
    """What the first rank that failed met, where it is damage or a refusal; else the error itself, with its traces."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    return next((cause for cause in causes if isinstance(cause, (sums.Damaged, metadata.Refused))), error)
