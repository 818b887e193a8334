"""Which ranks keep all others waiting: one rank, the leader, reads all heartbeats and reports it."""

import contextlib
from pathlib import Path

from slope_megatron.training.watch.heartbeat import Heartbeat, Listener, OwnTime, Pulse
from slope_megatron.training.watch.process import RankProcess

# A thread that beats every half second and has not for this long, or half of --hang-timeout, is stopped.
STOPPED_SECONDS = 5.0
# The leader reads the heartbeats for a little longer than that.
SPARE_SECONDS = 1.0
# How long ranks that hang wait for the leader's report before they report themselves.
LEADER_SECONDS = 10.0


class HangDetector:
    """Finds the ranks that hang; on the leader alone, unless that one reports nothing.

    Args:
        processes: of all ranks, in order.
        timeout: seconds without progress of this rank after which somebody hangs; 0: never.
    """

    def __init__(self, processes: list[RankProcess], pulse: Pulse, listener: Listener, clock: OwnTime, timeout: float):
        self.processes, self.pulse, self.listener = processes, pulse, listener
        self.clock, self.timeout = clock, timeout
        self.leads = False
        self.reports_after: float | None = None
        self.hears_since: float | None = None

    @property
    def stopped(self) -> float:
        """Seconds without a heartbeat from which on a rank is stopped."""
        return min(STOPPED_SECONDS, self.timeout / 2)

    def find(self) -> tuple[list[Heartbeat], list[Heartbeat]] | None:
        """Those that hang, and all heartbeats; None: nobody does yet, or another rank is to report it."""
        still, ahead = self.pulse.still(), self.stopped + SPARE_SECONDS
        if not self.timeout or still <= max(0.0, self.timeout - ahead):
            self.step_down()
            return None
        if self.reports_after is None:
            self.reports_after = self.elect(self.pulse.folder)
        if still <= self.reports_after - ahead:
            return None
        if self.hears_since is None:
            self.hears_since = self.clock.seconds
        beats = self.heartbeats()
        if still <= self.reports_after or self.clock.seconds - self.hears_since <= self.stopped:
            return None
        return suspects(beats, self.stopped), beats

    def elect(self, folder: Path) -> float:
        """Become the leader if there is none; returns after how many seconds without progress this rank reports."""
        try:
            open(folder / "leader", "x").close()
            self.leads = True
        except FileExistsError:
            return self.timeout + LEADER_SECONDS
        except OSError:  # a full disk is no reason to hang
            pass
        return self.timeout

    def step_down(self) -> None:
        """There was progress after all."""
        if self.leads:
            with contextlib.suppress(OSError):
                (self.pulse.folder / "leader").unlink(missing_ok=True)
        self.leads, self.reports_after, self.hears_since = False, None, None

    def heartbeats(self) -> list[Heartbeat]:
        """Of every rank that has announced itself and is not done; where no file can be read, this rank's own."""
        found = (self.listener.heartbeat(process.rank) for process in self.processes)
        return [beat for beat in found if beat is not None] or [self.pulse.heartbeat()]


def suspects(beats: list[Heartbeat], silence: float) -> list[Heartbeat]:
    """Which ranks keep the others waiting: the silent; else those behind; else those that do not wait themselves.

    Args:
        beats: of one rank at least.
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
    """Whom the others wait for, and what it was doing."""
    seconds = f"for more than {timeout:g} seconds (--hang-timeout)"
    ranks = "; ".join(f"{beat} in step {beat.step + 1}, {beat.part}, at {beat.where}" for beat in hung)
    if len(hung) < len(beats) or len(beats) == 1:
        return f"{ranks} hangs: no progress {seconds}"
    return f"no rank makes progress {seconds} and none stands out: {ranks}"
