"""A rank that dies or hangs stops the run, by name.

Each rank writes a heartbeat into RUN/ranks from a thread, which also looks after some others (`places`); whoever finds
one gone tells all. The thread works while the main one waits in a collective for a peer that is gone.

N ranks touch 3 N files of RUN/ranks every half second: each writes its own, reads the verdict, and looks at one of the
next host's. All are read when the run ends alone: of ranks that hang by one rank, of dead ones by those that find them.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from slope_megatron.training import heartbeat
from slope_megatron.training.heartbeat import Heartbeat, Pulse, Verdict
from slope_megatron.training.places import Place, afar, beside

POLL_SECONDS = 0.5
# A rank on another host is taken for dead after this long without a heartbeat.
SILENCE_SECONDS = 45.0
# A thread that beats every half second and has not for this long, or half of --hang-timeout, is stopped.
STOPPED_SECONDS = 5.0
# For which ranks that hang wait for the verdict of the one that was first.
JUDGEMENT_SECONDS = 10.0
DEAD_PEER_EXIT_CODE = 70
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RankWatch:
    """Looks after this run's ranks from `start` to `stop`.

    Args:
        run: the run folder, shared by all ranks.
        places: of all ranks, in order.
        rank: this one.
        describe: says in words what is lost and how to go on, for the message.
        hang_timeout: seconds without progress, from the first `reach` on, after which the run ends; 0: never.
    """

    def __init__(self, run: Path, places: list[Place], rank: int, describe, hang_timeout: float = 0.0):
        self.folder = run / "ranks"
        self.places, self.rank = places, rank
        self.beside, self.afar = beside(places, rank), afar(places, rank)
        self.describe = describe
        self.hang_timeout = hang_timeout
        self.judges_at: float | None = None
        self.pulse = Pulse(self.folder, places[rank])
        self.stopped = threading.Event()
        self.stop_requested = threading.Event()
        self.wake_read, self.wake_write = os.pipe()
        self.thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    def start(self) -> None:
        """Announce this rank. Call after a barrier that follows the removal of an older run's announcements."""
        self.pulse.announce()
        if self.rank == 0:
            heartbeat.make_room_for_verdict(self.folder)
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
        time.sleep(4 * POLL_SECONDS + (SILENCE_SECONDS if self.afar else 0.0))

    def stop(self) -> None:
        """This rank is done: its absence is no fault."""
        self.stopped.set()
        self.thread.join()
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self.pulse.remove()
        if self.rank == 0:
            heartbeat.remove_verdict(self.folder)

    def _watch(self) -> None:
        while not self.stopped.is_set():
            ready, _, _ = select.select([self.wake_read], [], [], POLL_SECONDS)
            self.look([number for number in os.read(self.wake_read, 64) if number in STOP_SIGNALS] if ready else [])

    def look(self, signals: list[int]) -> None:
        """One turn of the thread; ends the process where the run cannot go on.

        Args:
            signals: those of STOP_SIGNALS that came since the last turn.
        """
        self.pulse.beat()
        dead = self.dead()
        # In this order: a rank that is gone because of a verdict has left it behind.
        verdict = heartbeat.read_verdict(self.folder)
        if verdict:
            self._leave(verdict)
        if dead:
            self._end(f"{names(dead)} died; the run stops.", Verdict([]))
        # Told twice to end, a rank that is stuck ends; first it says whom it has lost.
        if signal.SIGTERM in signals and self.stop_requested.is_set():
            say(f"slope: rank {self.rank} was told twice to end")
            os._exit(128 + signal.SIGTERM)
        if signals and not self.stop_requested.is_set():
            self.stop_requested.set()
            name = signal.Signals(signals[0]).name
            say(f"slope: rank {self.rank} got {name}: saving after this step")
        if self.hang_timeout and self.pulse.still() > self.hang_timeout and self.is_judge():
            beats = self.beats()
            hung = suspects(beats, self.silence())
            what = f"{describe_hang(hung, beats, self.hang_timeout)}; the run stops."
            self._end(what, Verdict([beat.rank for beat in hung]))

    def silence(self) -> float:
        return min(STOPPED_SECONDS, self.hang_timeout / 2)

    def beats(self) -> list[Heartbeat]:
        """The last word of every rank that has announced itself and is not done."""
        found = (heartbeat.read(self.folder, place.rank) for place in self.places)
        return [beat for beat in found if beat is not None]

    def is_dead(self, place: Place) -> bool:
        """Its process is gone (this host), or it is silent (other hosts), and it has not said that it is done."""
        if place.host == self.places[self.rank].host:
            return place.is_gone and heartbeat.silence(self.folder, place.rank) is not None
        return (heartbeat.silence(self.folder, place.rank) or 0.0) > SILENCE_SECONDS

    def dead(self) -> list[Place]:
        """Nobody, mostly: this rank's charges are looked at. If one of them is dead, all ranks are, once."""
        charges = [place for place in (*self.beside, *self.afar) if self.is_dead(place)]
        if any(place in self.afar for place in charges):
            # What died with it falls silent within a beat of it.
            time.sleep(2 * POLL_SECONDS)
        return [place for place in self.places if self.is_dead(place)] if charges else []

    def is_judge(self) -> bool:
        """Whether this rank reads what all have said; the others end by its verdict, unless none comes."""
        if self.judges_at is None:
            self.judges_at = time.monotonic()
            try:
                open(self.folder / "judge", "x").close()
            except FileExistsError:
                self.judges_at += JUDGEMENT_SECONDS
            except OSError:  # a full disk is no reason to hang
                pass
        return time.monotonic() >= self.judges_at

    def _end(self, what: str, verdict: Verdict) -> None:
        """Say it once (the first rank to create the report prints it), tell the others, and leave."""
        message = f"slope: error: {what} {self.describe()}"
        try:
            with open(self.folder / "failure.txt", "x") as stream:
                stream.write(message + "\n")
            say(message)
        except FileExistsError:
            pass
        except OSError:
            say(message)
        with contextlib.suppress(OSError):  # they will find out by themselves
            heartbeat.write_verdict(self.folder, verdict)
        self._leave(verdict)

    def _leave(self, verdict: Verdict) -> None:
        """A stopped process would keep its device and its ports, and cannot end itself."""
        for place in self.beside:
            silent = heartbeat.silence(self.folder, place.rank) if place.rank in verdict.hung else None
            if silent is not None and silent > self.silence() and not place.is_gone:
                os.kill(place.pid, signal.SIGKILL)
        os._exit(DEAD_PEER_EXIT_CODE)


def say(message: str) -> None:
    """On a line of its own: a progress bar leaves its line open, and the main thread may never close it."""
    print(f"\n{message}", file=sys.stderr, flush=True)


def names(places: list[Place]) -> str:
    return ", ".join(map(str, places))


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
