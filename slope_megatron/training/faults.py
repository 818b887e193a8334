"""A rank that dies stops the run within seconds, by name.

Each rank writes its process into RUN/ranks and touches that file as a heartbeat; a thread looks after the others. The
thread works while the main one waits in a collective for a peer that is gone.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from slope_megatron.training import files

POLL_SECONDS = 0.5
# A rank on another host is taken for dead after this long without a heartbeat.
SILENCE_SECONDS = 45.0
DEAD_PEER_EXIT_CODE = 70
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RankWatch:
    """Looks after this run's ranks from `start` to `stop`.

    Args:
        run: the run folder, shared by all ranks.
        describe: says in words what is lost and how to go on, for the message.
    """

    def __init__(self, run: Path, rank: int, world: int, describe):
        self.folder = run / "ranks"
        self.rank = rank
        self.world = world
        self.describe = describe
        self.host = socket.gethostname()
        self.stopped = threading.Event()
        self.stop_requested = threading.Event()
        self.wake_read, self.wake_write = os.pipe()
        self.thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    def start(self) -> None:
        """Announce this rank. Call after a barrier that follows the removal of an older run's announcements."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self._file(self.rank), {"rank": self.rank, "pid": os.getpid(), "host": self.host})
        # USR1 and TERM ask for a checkpoint and a clean end, as a job scheduler does before its time limit. A launcher
        # that sees a dead rank ends the others with TERM, too: they say first whom they have lost. The wake-up
        # descriptor reaches the thread although the main thread sits in a collective.
        os.set_blocking(self.wake_write, False)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        self.thread.start()

    def stop(self) -> None:
        """This rank is done: its absence is no fault."""
        self.stopped.set()
        self.thread.join()
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self._file(self.rank).unlink(missing_ok=True)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"

    def _watch(self) -> None:
        while not self.stopped.is_set():
            ready, _, _ = select.select([self.wake_read], [], [], POLL_SECONDS)
            signals = [number for number in os.read(self.wake_read, 64) if number in STOP_SIGNALS] if ready else []
            os.utime(self._file(self.rank))
            dead = self.dead_ranks()
            if dead:
                self._report(dead)
                os._exit(DEAD_PEER_EXIT_CODE)
            if signal.SIGTERM in signals and self.stop_requested.is_set():
                print(f"slope: rank {self.rank} was told twice to end", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)
            if signals and not self.stop_requested.is_set():
                self.stop_requested.set()
                name = signal.Signals(signals[0]).name
                print(f"slope: rank {self.rank} got {name}: saving after this step", file=sys.stderr, flush=True)

    def dead_ranks(self) -> list[dict]:
        """Announced ranks whose process is gone (this host) or silent (other hosts)."""
        dead = []
        for rank in range(self.world):
            path = self._file(rank)
            try:
                entry = json.loads(path.read_text())
                silent = time.time() - path.stat().st_mtime
            except FileNotFoundError:
                continue  # not announced yet, or done
            if self._is_gone(entry["pid"]) if entry["host"] == self.host else silent > SILENCE_SECONDS:
                dead.append(entry)
        return dead

    @staticmethod
    def _is_gone(pid: int) -> bool:
        """Gone, or dead and not yet collected by its parent."""
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        return state in ("Z", "X")

    def _report(self, dead: list[dict]) -> None:
        """Say it once: the first rank to create the report prints it."""
        who = ", ".join(f"rank {entry['rank']} (process {entry['pid']} on {entry['host']})" for entry in dead)
        message = f"slope: error: {who} died; the run stops. {self.describe()}"
        try:
            with open(self.folder / "failure.txt", "x") as stream:
                stream.write(message + "\n")
        except FileExistsError:
            return
        print(message, file=sys.stderr, flush=True)
