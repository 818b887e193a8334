"""A rank that dies or hangs stops the run, by name.

A thread of each rank writes a heartbeat into RUN/ranks and watches some other ranks, its peers (`process`). The rank
that finds one gone writes a failure report, and all ranks end. The thread works while the main one waits in a
collective for a rank that is gone.

N ranks touch 3 N files of RUN/ranks every half second: each writes its own heartbeat, reads the failure report, and
reads one heartbeat of the next host. All heartbeats are read only before the run ends: by the leader when ranks hang
(`hangs`), and by the ranks that find a dead one.
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
from slope_megatron.training.watch.hangs import HangDetector, describe_hang
from slope_megatron.training.watch.heartbeat import Listener, OwnTime, Pulse
from slope_megatron.training.watch.launcher import Launcher, unblock_output
from slope_megatron.training.watch.process import RankProcess, local_peers, remote_peers

POLL_SECONDS = 0.5
# A rank on another host is taken for dead after this long without a heartbeat that is new to this one.
SILENCE_SECONDS = 45.0
DEAD_PEER_EXIT_CODE = 70
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class RankWatch:
    """Watches this rank's peers from `start` to `stop`.

    Args:
        run: the run folder, shared by all ranks.
        processes: of all ranks, in order.
        rank: this one.
        describe: says in words what is lost and how to go on, for the message.
        hang_timeout: seconds without progress, from the first `reach` on, after which the run ends; 0: never.
        launcher: what started this rank; if that goes, all ranks save and end. None: nothing did.
        saves: whether the run writes checkpoints.
    """

    def __init__(
        self,
        run: Path,
        processes: list[RankProcess],
        rank: int,
        describe,
        hang_timeout: float = 0.0,
        launcher: Launcher | None = None,
        saves: bool = True,
    ):
        self.folder = run / "ranks"
        self.processes, self.rank = processes, rank
        self.local_peers, self.remote_peers = local_peers(processes, rank), remote_peers(processes, rank)
        self.other_hosts = [other for other in processes if other.machine != processes[rank].machine]
        self.describe = describe
        self.launcher = launcher or Launcher("")
        self.hang_timeout, self.saves = hang_timeout, saves
        self.clock = OwnTime()
        self.pulse = Pulse(self.folder, processes[rank], self.clock)
        self.listener = Listener(self.folder, self.clock)
        self.hangs = HangDetector(processes, self.pulse, self.listener, self.clock, hang_timeout)
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
            heartbeat.reserve_report(self.folder)
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

    def pause(self) -> None:
        """The main thread may stand still until it next reaches a part."""
        self.pulse.watched = False

    def await_report(self) -> None:
        """A collective failed in the main thread: perhaps a rank is gone, which the thread reports in a moment."""
        time.sleep(4 * POLL_SECONDS + (SILENCE_SECONDS if self.remote_peers else 0.0))

    def stop(self) -> None:
        """This rank is done: its absence is no fault."""
        self.stopped.set()
        self.thread.join()
        signal.set_wakeup_fd(-1)
        for number in self.heeded:
            signal.signal(number, signal.SIG_DFL)
        self.pulse.remove()

    def _watch(self) -> None:
        while not self.stopped.is_set():
            try:
                ready, _, _ = select.select([self.wake_read], [], [], POLL_SECONDS)
                self.look([number for number in os.read(self.wake_read, 64) if number in STOP_SIGNALS] if ready else [])
            except Exception as error:
                self.go_on_after(error)

    def go_on_after(self, error: Exception) -> None:
        """Log a `look` that failed, once for each line of code, and go on: without this thread nobody would miss a
        rank, and TERM, USR1 and HUP would ask in vain."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if (fault := f"{frame.filename}:{frame.lineno}") not in self.faults:
            self.faults.add(fault)
            what = "".join(traceback.format_exception(error)).rstrip()
            say(f"slope: error: rank {self.rank}: looking after the ranks failed, and is tried again\n{what}")
        self.heed()
        self.stopped.wait(POLL_SECONDS)

    def look(self, signals: list[int]) -> None:
        """What the thread does every half second; ends the process where the run cannot go on.

        Args:
            signals: those of STOP_SIGNALS that came since the last call.
        """
        self.signals += signals
        self.clock.tick()
        self.pulse.beat()
        dead = self.dead()
        # Read after the search: a rank that ended because of a report wrote that first. And before signals are heeded:
        # a launcher that misses a rank sends TERM, and the lost rank is to be named first.
        hung = heartbeat.read_report(self.folder)
        if hung is not None:
            self._leave(hung)
        if dead:
            self._end(f"{', '.join(map(str, dead))} died; the run stops.", [])
        self.heed()
        gone = self.launcher.gone()
        if gone and not self.stop_requested.is_set():
            unblock_output()
            self.request_stop(f"has lost its launcher ({gone})")
        found = self.hangs.find()
        if found:
            late, beats = found
            alone = " (no other rank can be heard)" if len(self.processes) > len(beats) == 1 else ""
            what = f"{describe_hang(late, beats, self.hang_timeout)}{alone}; the run stops."
            self._end(what, [beat.rank for beat in late])

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
            what = "saving after this step" if self.saves else "ending after this step, unsaved (--save-interval is 0)"
            say(f"slope: rank {self.rank} {why}: {what}")

    def lives(self, process: RankProcess) -> bool:
        """Whether a rank of this host runs and has not said that it is done."""
        return not process.is_gone and heartbeat.is_announced(self.folder, process.rank)

    def dead(self) -> list[RankProcess]:
        """The ranks that died. Only this rank's peers are looked at, until one of them is found dead.

        Whether ranks of other hosts died with it can be told of those whose heartbeats have been read for a while: all
        of them are, from the moment on when a remote peer has been silent for half of SILENCE_SECONDS.
        """
        gone = [peer for peer in self.local_peers if peer.is_gone and heartbeat.is_announced(self.folder, peer.rank)]
        longest = max(map(self.silence, self.remote_peers), default=0.0)
        if longest > SILENCE_SECONDS / 2 and not self.alarmed:
            for other in self.other_hosts:
                self.silence(other)
        self.alarmed = longest > SILENCE_SECONDS / 2
        if longest > SILENCE_SECONDS:
            # Of ranks that died together, all have been silent since the alarm, a third of the time ago and more.
            gone += [other for other in self.other_hosts if self.silence(other) > SILENCE_SECONDS / 3]
        return sorted(gone, key=lambda process: process.rank)

    def silence(self, process: RankProcess) -> float:
        """Seconds for which this rank has heard nothing of another; 0 for one that is done, or never began."""
        return self.listener.silence(process.rank) or 0.0

    def _end(self, what: str, hung: list[int]) -> None:
        """Say it once (the first rank to create failure.txt prints it), tell the others, and leave."""
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
            heartbeat.write_report(self.folder, hung)
        self._leave(hung)

    def _leave(self, ranks: list[int]) -> None:
        """End this process, and stopped ones of this host: those keep their device and ports, and cannot end."""
        hung = [peer for peer in self.local_peers if peer.rank in ranks]
        # A rank whose thread still beats ends by the report; how long it has been silent may not be known yet.
        until = self.clock.seconds + self.hangs.stopped + 2.0
        while hung and self.clock.seconds < until:
            self.clock.tick()
            for peer in [peer for peer in hung if self.silence(peer) > self.hangs.stopped and not peer.is_gone]:
                with contextlib.suppress(ProcessLookupError):  # ended just now
                    os.kill(peer.pid, signal.SIGKILL)
                hung.remove(peer)
            hung = [peer for peer in hung if self.lives(peer)]
            if hung:
                time.sleep(POLL_SECONDS)
        os._exit(DEAD_PEER_EXIT_CODE)


def say(message: str) -> None:
    """On a line of its own: a progress bar leaves its line open, and the main thread may never close it."""
    with contextlib.suppress(OSError):  # whoever read it is gone
        print(f"\n{message}", file=sys.stderr, flush=True)
