"""What ranks tell each other through RUN/ranks.

rank_N.json    each rank's heartbeat: that it lives, and how far its main thread has come
failure.json   a report by the rank that finds that the run cannot go on; blank until then

A rank lives as long as what it writes changes. No two clocks are ever compared: those of hosts and file servers differ,
by hours where nobody set them, and jump when somebody does. So it is the reader who measures for how long a heartbeat
has not changed.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path

from slope_megatron.storage import whole
from slope_megatron.training.watch.process import RankProcess

# Parts of a step in the order in which the main thread reaches them.
PARTS = ("start", "batch", "forward and backward", "gradients", "update", "validation", "checkpoint")
# Written in place in one piece of always the same size: no new space is needed, even on a full disk.
RECORD_BYTES = 512
REPORT_BYTES = 4096
PACKAGE = f"{os.sep}slope_megatron{os.sep}"
COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")
# In more than this nobody could be heard: the job was suspended, or the disk stood still.
MAX_TICK_SECONDS = 2.0


class OwnTime:
    """Seconds during which this process could watch others; they pass from one `tick` of its thread to the next."""

    def __init__(self):
        self.seconds = 0.0
        self.last = time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self.last, MAX_TICK_SECONDS)
        self.last = now


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What one rank has written last.

    Args:
        step: steps done; `part`: what it was doing then.
        still: seconds for which its main thread had not come further; negative: not watched yet.
        where: the line of code, and `waits`: whether that is a wait for other ranks.
        beats: its number, by which one differs from the last.
        silent: seconds for which the reader has found it unchanged.
    """

    rank: int
    pid: int
    host: str
    step: int
    part: str
    still: float
    where: str
    waits: bool
    beats: int = 0
    silent: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def reached(self) -> tuple[int, int]:
        return self.step, PARTS.index(self.part)


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def read_raw(folder: Path, rank: int) -> tuple[str, int] | None:
    """What a rank has written, and the time that its disk gave it: any change of either is a sign of life.

    Returns:
        None: not announced yet, done, or not to be read now.
    """
    try:
        with open(file_of(folder, rank)) as stream:
            return stream.read(), os.fstat(stream.fileno()).st_mtime_ns
    except (OSError, ValueError):
        return None


def read(folder: Path, rank: int) -> Heartbeat | None:
    """A rank's last heartbeat; None: not announced yet, done, or being written."""
    written = read_raw(folder, rank)
    try:
        return Heartbeat(**json.loads(written[0])) if written else None
    except (ValueError, TypeError):
        return None


def is_announced(folder: Path, rank: int) -> bool:
    """Whether a rank takes part in the run and is not done."""
    return os.path.exists(file_of(folder, rank))


class Listener:
    """How long others have written nothing new; their files are read when they are asked for."""

    def __init__(self, folder: Path, clock: OwnTime):
        self.folder, self.clock = folder, clock
        self.heard: dict[int, tuple[tuple[str, int], float]] = {}

    def silence(self, rank: int) -> float | None:
        """Seconds since a rank's last heartbeat was new to this one; None: not announced yet, done, or unreadable."""
        written = read_raw(self.folder, rank)
        if written is None:
            self.heard.pop(rank, None)
            return None
        if rank not in self.heard or self.heard[rank][0] != written:
            self.heard[rank] = written, self.clock.seconds
        return self.clock.seconds - self.heard[rank][1]

    def heartbeat(self, rank: int) -> Heartbeat | None:
        """A rank's last one, with its silence; None: not announced yet, done, or being written."""
        silent = self.silence(rank)
        found = read(self.folder, rank)
        return dataclasses.replace(found, silent=silent) if found and silent is not None else None


def reserve_report(folder: Path) -> None:
    """Take the space that a failure report needs, before the disk may be full."""
    with contextlib.suppress(FileExistsError), open(folder / "failure.json", "x") as stream:
        stream.write(" " * REPORT_BYTES)


def write_report(folder: Path, hung: list[int]) -> None:
    """Tell all ranks that the run ends, in place and in one piece.

    Args:
        hung: ranks that do not end by themselves.
    Raises:
        OSError: it cannot be written.
    """
    content = json.dumps({"hung": hung}).ljust(REPORT_BYTES)
    descriptor = os.open(folder / "failure.json", os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, content.encode())
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


def read_report(folder: Path) -> list[int] | None:
    """The ranks that hang; None: there is no report, or it is being written."""
    try:
        return json.loads((folder / "failure.json").read_text())["hung"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


class Pulse:
    """Writes this rank's heartbeat, and remembers how far the main thread has come."""

    def __init__(self, folder: Path, own: RankProcess, clock: OwnTime):
        self.folder, self.own, self.rank, self.clock = folder, own, own.rank, clock
        self.main = threading.main_thread().ident or 0
        self.progress = (0, "start", clock.seconds)
        self.watched = False
        self.beats = 0

    def reach(self, step: int, part: str) -> None:
        """The main thread begins `part` after `step` steps."""
        self.progress = (step, part, self.clock.seconds)

    def announce(self) -> None:
        """Write the first heartbeat, which creates the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole.write_text(file_of(self.folder, self.rank), self.record())

    def beat(self) -> None:
        """Write the next one; on a disk that cannot be written now, change the file's time."""
        self.beats += 1
        path = file_of(self.folder, self.rank)
        try:
            with open(path, "r+b", buffering=0) as stream:
                stream.write(self.record().encode())
        except OSError:
            with contextlib.suppress(OSError):
                os.utime(path)

    def remove(self) -> None:
        """This rank is done; the first one takes the blank report away, too."""
        with contextlib.suppress(OSError):
            file_of(self.folder, self.rank).unlink(missing_ok=True)
            if self.rank == 0:
                (self.folder / "failure.json").unlink(missing_ok=True)

    def still(self) -> float:
        return self.clock.seconds - self.progress[2] if self.watched else -1.0

    def heartbeat(self) -> Heartbeat:
        """What the others read of this rank."""
        step, part, _ = self.progress
        where, waits = self.location()
        still = round(self.still(), 1)
        return Heartbeat(self.rank, self.own.pid, self.own.host, step, part, still, where[-120:], waits, self.beats)

    def record(self) -> str:
        return json.dumps(dataclasses.asdict(self.heartbeat())).ljust(RECORD_BYTES - 1) + "\n"

    def location(self) -> tuple[str, bool]:
        """The innermost line of this program that the main thread is in, and whether it waits in a collective."""
        frame = sys._current_frames().get(self.main)
        waits = False
        while frame is not None:
            name = frame.f_code.co_filename
            waits = waits or any(part in name for part in COLLECTIVES)
            if PACKAGE in name:
                return f"{name.rpartition(PACKAGE)[2]}:{frame.f_lineno}", waits
            frame = frame.f_back
        return "outside this program", waits
