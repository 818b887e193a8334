"""Whether prepared data is still what was written: read once at the start of a run, large files while it trains.

One rank reads for all that see the same files: the first one, or the first of each machine that has a copy of its own.
"""

import threading
from pathlib import Path

import torch.distributed as dist

from slope_megatron.data import manifest
from slope_megatron.storage import whole
from slope_megatron.training.together import Agreed, first_problem, from_every_rank

# Tokens beyond this many bytes are read in the background: about a second of a fast disk.
AT_ONCE = 1 << 30


class DamagedData(Agreed):
    """Data that a run has begun to train on is not what was written."""


class DataCheck:
    """Begins with the run; all ranks make it.

    Args:
        sizes: bytes of each file of the data.
    Attributes:
        problem: what this rank found in the background; None: nothing so far.
    Raises:
        Agreed: a small file is not what was written; nothing was trained on it.
    """

    def __init__(self, folder: Path, sizes: dict[str, int]):
        self.folder = folder
        large = {name for name, size in sizes.items() if name.endswith(".bin") and size > AT_ONCE}
        seen, unseen = identity([folder / name for name in sorted(sizes)])
        reads = from_every_rank(seen).index(seen) == dist.get_rank()
        small = set(sizes) - large
        if found := first_problem(unseen or (self.compare(small) if reads else None)):
            raise Agreed(found)
        self.problem: str | None = None
        self.thread: threading.Thread | None = None
        if reads and large:
            self.thread = threading.Thread(target=self.compare_later, args=(large,), name="data-check", daemon=True)
            self.thread.start()

    def compare(self, names: set[str]) -> str | None:
        """What is wrong with these files, if anything."""
        try:
            manifest.verify(self.folder, names.__contains__)
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"{self.folder} cannot be read ({whole.reason(error)}): make it readable, or put it on another disk"
        return None

    def compare_later(self, names: set[str]) -> None:
        """In the thread. It never ends without a word: data of which nothing is said counts as whole."""
        try:
            self.problem = self.compare(names)
        except BaseException as error:
            self.problem = f"{self.folder} could not be compared with what was written ({whole.reason(error)})"

    def busy(self) -> bool:
        """Whether this rank still reads."""
        return self.thread is not None and self.thread.is_alive()

    def stop(self, began: int, done: int, saved: list[str]) -> None:
        """End the run on every rank, once one of them has found a problem.

        Args:
            began: steps done when the run began; `done`: now.
            saved: names of the checkpoints written since.
        Raises:
            DamagedData: always.
        """
        kept = f"; remove {', '.join(saved)}, trained on it" if saved else ""
        raise DamagedData(
            f"{first_problem(self.problem)}. The run stops after step {done}; steps from {began + 1} on may have read "
            f"it{kept}, and once the data is whole go on with --resume, or start anew"
        )


def identity(paths: list[Path]) -> tuple[list[tuple[int, int, int]], str | None]:
    """Numbers and times of files, which a copy has of its own; and why they cannot be seen, if so."""
    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        return [], f"a rank cannot see the data ({whole.reason(error)}): put it where all of them see it"
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats], None
