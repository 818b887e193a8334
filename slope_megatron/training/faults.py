"""A rank that dies or hangs stops the run, by name.

Each rank writes a heartbeat into RUN/ranks from a thread, which also looks after the others. The thread works while the
main one waits in a collective for a peer that is gone.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from slope_megatron.training import heartbeat
from slope_megatron.training.heartbeat import Heartbeat, Pulse

POLL_SECONDS = 0.5
# A rank on another host is taken for dead after this long without a heartbeat.
SILENCE_SECONDS = 45.0
# A thread that beats every half second and has not for this long, or half of --hang-timeout, is stopped.
STOPPED_SECONDS = 5.0
DEAD_PEER_EXIT_CODE = 70
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RankWatch:
    """Looks after this run's ranks from `start` to `stop`.

    Args:
        run: the run folder, shared by all ranks.
        describe: says in words what is lost and how to go on, for the message.
        hang_timeout: seconds without progress, from the first `reach` on, after which the run ends; 0: never.
    """

    def __init__(self, run: Path, rank: int, world: int, describe, hang_timeout: float = 0.0):
        self.folder = run / "ranks"
        self.rank = rank
        self.world = world
        self.describe = describe
        self.hang_timeout = hang_timeout
        self.host = socket.gethostname()
        self.pulse = Pulse(self.folder, rank)
        self.stopped = threading.Event()
        self.stop_requested = threading.Event()
        self.wake_read, self.wake_write = os.pipe()
        self.thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    def start(self) -> None:
        """Announce this rank. Call after a barrier that follows the removal of an older run's announcements."""
        self.pulse.announce()
        # USR1 and TERM ask for a checkpoint and a clean end, as a job scheduler does before its time limit. A launcher
        # that sees a dead rank ends the others with TERM, too: they say first whom they have lost. The wake-up
        # descriptor reaches the thread although the main thread sits in a collective.
        os.set_blocking(self.wake_write, False)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        self.thread.start()

    def reach(self, step: int, part: str) -> None:
        """The main thread has done `step` steps and begins `part`: from here on it must not stand still."""
        self.pulse.reach(step, part)
        self.pulse.watched = self.hang_timeout > 0

    def await_verdict(self) -> None:
        """A collective failed in the main thread: perhaps its peer is gone, which the thread says in a moment."""
        elsewhere = any(beat.host != self.host for beat in self.beats())
        time.sleep(4 * POLL_SECONDS + (SILENCE_SECONDS if elsewhere else 0.0))

    def stop(self) -> None:
        """This rank is done: its absence is no fault."""
        self.stopped.set()
        self.thread.join()
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self.pulse.remove()

    def _watch(self) -> None:
        while not self.stopped.is_set():
            ready, _, _ = select.select([self.wake_read], [], [], POLL_SECONDS)
            signals = [number for number in os.read(self.wake_read, 64) if number in STOP_SIGNALS] if ready else []
            self.pulse.beat()
            beats = self.beats()
            dead = [beat for beat in beats if self.is_dead(beat)]
            if dead:
                self._end(f"{names(dead)} died; the run stops.", [])
            # Told twice to end, a rank that is stuck ends; first it says whom it has lost.
            if signal.SIGTERM in signals and self.stop_requested.is_set():
                print(f"slope: rank {self.rank} was told twice to end", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)
            if signals and not self.stop_requested.is_set():
                self.stop_requested.set()
                name = signal.Signals(signals[0]).name
                print(f"slope: rank {self.rank} got {name}: saving after this step", file=sys.stderr, flush=True)
            if self.hang_timeout and self.pulse.still() > self.hang_timeout:
                hung = suspects(beats, self.silence())
                self._end(f"{describe_hang(hung, beats, self.hang_timeout)}; the run stops.", hung)

    def silence(self) -> float:
        return min(STOPPED_SECONDS, self.hang_timeout / 2)

    def beats(self) -> list[Heartbeat]:
        """The last word of every rank that has announced itself and is not done."""
        found = (heartbeat.read(self.folder, rank) for rank in range(self.world))
        return [beat for beat in found if beat is not None]

    def is_dead(self, beat: Heartbeat) -> bool:
        """Its process is gone (this host), or it is silent (other hosts)."""
        if beat.host == self.host:
            return heartbeat.born(beat.pid) != beat.born
        return beat.silent > SILENCE_SECONDS

    def _end(self, what: str, hung: list[Heartbeat]) -> None:
        """Say it once (the first rank to create the report prints it) and leave."""
        message = f"slope: error: {what} {self.describe()}"
        try:
            with open(self.folder / "failure.txt", "x") as stream:
                stream.write(message + "\n")
            print(message, file=sys.stderr, flush=True)
        except FileExistsError:
            pass
        except OSError:
            print(message, file=sys.stderr, flush=True)
        for beat in hung:
            # A stopped process would keep its device and its ports; it cannot end itself.
            here = beat.host == self.host and beat.rank != self.rank
            if here and beat.silent > self.silence() and not self.is_dead(beat):
                os.kill(beat.pid, signal.SIGKILL)
        os._exit(DEAD_PEER_EXIT_CODE)


def names(beats: list[Heartbeat]) -> str:
    return ", ".join(map(str, beats))


def suspects(beats: list[Heartbeat], silence: float) -> list[Heartbeat]:
    """Which ranks keep the others waiting: the silent; else those behind; else those that do not wait themselves.

    Args:
        silence: seconds without a heartbeat from which on a rank is silent.
    """
    silent = [beat for beat in beats if beat.silent > silence]
    if silent:
        return silent
    behind = min(beat.reached for beat in beats)
    late = [beat for beat in beats if beat.reached == behind]
    if len(late) < len(beats):
        return late
    busy = [beat for beat in beats if not beat.waits]
    return busy if busy and len(busy) < len(beats) else beats


def describe_hang(hung: list[Heartbeat], beats: list[Heartbeat], timeout: float) -> str:
    """Whom the others wait for, and where it is."""
    seconds = f"for more than {timeout:g} seconds (--hang-timeout)"
    places = "; ".join(f"{beat} in step {beat.step + 1}, {beat.part}, at {beat.where}" for beat in hung)
    if len(hung) < len(beats) or len(beats) == 1:
        return f"{places} hangs: no progress {seconds}"
    return f"no rank makes progress {seconds} and none stands out: {places}"
