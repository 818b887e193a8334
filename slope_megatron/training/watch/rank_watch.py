"""A rank that dies or hangs stops the run, by name.

Each rank writes a heartbeat into RUN/ranks from a thread, which also looks after some others (`places`); whoever finds
one gone tells all. The thread works while the main one waits in a collective for a peer that is gone.

N ranks touch 3 N files of RUN/ranks every half second: each writes its own, reads the verdict, and reads one of the
next host's. All are read when the run may end alone: of ranks that hang by one rank, of dead ones by those that find
them. A heartbeat is a change of what was read, timed by the reader (`own_time`): no other clock is looked at.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from slope_megatron.training.watch import heartbeat
from slope_megatron.training.watch.hangs import Judge, describe_hang
from slope_megatron.training.watch.heartbeat import Listener, Pulse, Verdict
from slope_megatron.training.watch.launcher import Launcher, unblock_output
from slope_megatron.training.watch.own_time import OwnTime
from slope_megatron.training.watch.process import Place, afar, beside

POLL_SECONDS = 0.5
# A rank on another host is taken for dead after this long without a heartbeat that is new to this one.
SILENCE_SECONDS = 45.0
DEAD_PEER_EXIT_CODE = 70
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class RankWatch:
    """Looks after this run's ranks from `start` to `stop`.

    Args:
        run: the run folder, shared by all ranks.
        places: of all ranks, in order.
        rank: this one.
        describe: says in words what is lost and how to go on, for the message.
        hang_timeout: seconds without progress, from the first `reach` on, after which the run ends; 0: never.
        launcher: what started this rank; if that goes, all ranks save and end. None: nothing did.
    """

    def __init__(
        self,
        run: Path,
        places: list[Place],
        rank: int,
        describe,
        hang_timeout: float = 0.0,
        launcher: Launcher | None = None,
    ):
        self.folder = run / "ranks"
        self.places, self.rank = places, rank
        self.beside, self.afar = beside(places, rank), afar(places, rank)
        self.elsewhere = [place for place in places if place.machine != places[rank].machine]
        self.describe = describe
        self.launcher = launcher or Launcher("")
        self.hang_timeout = hang_timeout
        self.clock = OwnTime()
        self.pulse = Pulse(self.folder, places[rank], self.clock)
        self.listener = Listener(self.folder, self.clock)
        self.judge = Judge(places, self.pulse, self.listener, self.clock, hang_timeout)
        self.alarmed = False
        self.stopped = threading.Event()
        self.stop_requested = threading.Event()
        self.signals: list[int] = []
        self.signalled = False
        self.faults: set[str] = set()
        self.wake_read, self.wake_write = os.pipe()
        self.thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    def start(self) -> None:
        """Announce this rank. Call after a barrier that follows the removal of an older run's announcements."""
        self.pulse.announce()
        if self.rank == 0:
            heartbeat.make_room_for_verdict(self.folder)
        # USR1 and TERM ask for a checkpoint and a clean end, as a job scheduler does before its time limit, and HUP
        # when a terminal closes (under nohup it is ignored, and stays so). A launcher that sees a dead rank ends the
        # others with TERM, too: they say first whom they have lost. The wake-up descriptor reaches the thread although
        # the main thread sits in a collective.
        self.heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        os.set_blocking(self.wake_write, False)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        for number in self.heeded:
            signal.signal(number, lambda *_: None)
        self.thread.start()
        self.launcher.handed_over.set()

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
        for number in self.heeded:
            signal.signal(number, signal.SIG_DFL)
        self.pulse.remove()
        if self.rank == 0:
            heartbeat.remove_verdict(self.folder)

    def _watch(self) -> None:
        while not self.stopped.is_set():
            try:
                ready, _, _ = select.select([self.wake_read], [], [], POLL_SECONDS)
                self.look([number for number in os.read(self.wake_read, 64) if number in STOP_SIGNALS] if ready else [])
            except Exception as error:
                self.go_on_after(error)

    def go_on_after(self, error: Exception) -> None:
        """A turn that failed is said, once for each place, and the next one comes: without this thread nobody would
        miss a rank, and TERM, USR1 and HUP would ask in vain."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        if (fault := f"{place.filename}:{place.lineno}") not in self.faults:
            self.faults.add(fault)
            what = "".join(traceback.format_exception(error)).rstrip()
            say(f"slope: error: rank {self.rank}: looking after the ranks failed, and is tried again\n{what}")
        self.heed()
        self.stopped.wait(POLL_SECONDS)

    def look(self, signals: list[int]) -> None:
        """One turn of the thread; ends the process where the run cannot go on.

        Args:
            signals: those of STOP_SIGNALS that came since the last turn.
        """
        self.signals += signals
        self.clock.tick()
        self.pulse.beat()
        dead = self.dead()
        # In this order: a rank that is gone because of a verdict has left it behind, and whoever is told to end says
        # first whom it has lost.
        verdict = heartbeat.read_verdict(self.folder)
        if verdict:
            self._leave(verdict)
        if dead:
            self._end(f"{names(dead)} died; the run stops.", Verdict([]))
        self.heed()
        gone = self.launcher.gone()
        if gone and not self.stop_requested.is_set():
            unblock_output()
            self.request_stop(f"has lost its launcher ({gone})")
        found = self.judge.rule()
        if found:
            hung, beats = found
            alone = " (no other rank can be heard)" if len(self.places) > len(beats) == 1 else ""
            what = f"{describe_hang(hung, beats, self.hang_timeout)}{alone}; the run stops."
            self._end(what, Verdict([beat.rank for beat in hung]))

    def heed(self) -> None:
        """The signals that nobody has heeded yet. Told twice to end, a rank that is stuck ends."""
        signals, self.signals = self.signals, []
        if signal.SIGTERM in signals and self.signalled:
            say(f"slope: rank {self.rank} was told twice to end")
            os._exit(128 + signal.SIGTERM)
        if signals:
            self.signalled = True
            self.request_stop(f"got {signal.Signals(signals[0]).name}")

    def request_stop(self, why: str) -> None:
        """All ranks save after the same step, and end."""
        if not self.stop_requested.is_set():
            self.stop_requested.set()
            say(f"slope: rank {self.rank} {why}: saving after this step")

    def is_gone(self, place: Place) -> bool:
        """Whether the process of a rank of this host has ended, and has not said that it is done."""
        return place.is_gone and heartbeat.is_announced(self.folder, place.rank)

    def dead(self) -> list[Place]:
        """Nobody, mostly: this rank's charges are looked at. If one of them is dead, all ranks are, once.

        How long a rank has been silent is known of those alone that are heard: all of them from the moment on when one
        of the charges has been silent for half of the time after which it is dead.
        """
        gone = [place for place in self.beside if self.is_gone(place)]
        longest = max((self.silence(place) for place in self.afar), default=0.0)
        if longest > SILENCE_SECONDS / 2 and not self.alarmed:
            for place in self.elsewhere:
                self.silence(place)
        self.alarmed = longest > SILENCE_SECONDS / 2
        if longest > SILENCE_SECONDS:
            # Who died with it has not been heard since the alarm, which was a third of the time ago and more.
            gone += [place for place in self.elsewhere if self.silence(place) > SILENCE_SECONDS / 3]
        return sorted(gone, key=lambda place: place.rank)

    def silence(self, place: Place) -> float:
        """Seconds for which this rank has heard nothing of another; 0 for one that is done, or never began."""
        return self.listener.silence(place.rank) or 0.0

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
        hung = [place for place in self.beside if place.rank in verdict.hung]
        # A rank whose thread still beats ends by the verdict; how long it has been silent may not be known yet.
        until = self.clock.seconds + self.judge.stopped + 2.0
        while hung and self.clock.seconds < until:
            self.clock.tick()
            for place in [place for place in hung if self.silence(place) > self.judge.stopped and not place.is_gone]:
                with contextlib.suppress(ProcessLookupError):  # ended just now
                    os.kill(place.pid, signal.SIGKILL)
                hung.remove(place)
            hung = [place for place in hung if self.is_heard(place)]
            if hung:
                time.sleep(POLL_SECONDS)
        os._exit(DEAD_PEER_EXIT_CODE)

    def is_heard(self, place: Place) -> bool:
        return not place.is_gone and heartbeat.is_announced(self.folder, place.rank)


def say(message: str) -> None:
    """On a line of its own: a progress bar leaves its line open, and the main thread may never close it."""
    with contextlib.suppress(OSError):  # whoever read it is gone
        print(f"\n{message}", file=sys.stderr, flush=True)


def names(places: list[Place]) -> str:
    return ", ".join(map(str, places))
