"""Which ranks keep all others waiting: one rank, the judge, hears everybody and says it."""

import contextlib
from pathlib import Path

from slope_megatron.training.watch.heartbeat import Heartbeat, Listener, Pulse
from slope_megatron.training.watch.own_time import OwnTime
from slope_megatron.training.watch.process import Place

# A thread that beats every half second and has not for this long, or half of --hang-timeout, is stopped.
STOPPED_SECONDS = 5.0
# The judge hears the others a little longer than that.
SPARE_SECONDS = 1.0
# For which ranks that hang wait for the verdict of the one that was first.
JUDGEMENT_SECONDS = 10.0


class Judge:
    """Says who hangs, if anybody does; of all ranks one alone, unless that one says nothing.

    Args:
        places: of all ranks, in order.
        timeout: seconds without progress of this rank after which somebody hangs; 0: never.
    """

    def __init__(self, places: list[Place], pulse: Pulse, listener: Listener, clock: OwnTime, timeout: float):
        self.places, self.pulse, self.listener, self.clock, self.timeout = places, pulse, listener, clock, timeout
        self.elected = False
        self.rules_after: float | None = None
        self.hears_since: float | None = None

    @property
    def stopped(self) -> float:
        """Seconds without a heartbeat from which on a rank is stopped."""
        return min(STOPPED_SECONDS, self.timeout / 2)

    def rule(self) -> tuple[list[Heartbeat], list[Heartbeat]] | None:
        """Those that hang, and everybody's last word; None: nobody does yet, or it is for another rank to say."""
        still, ahead = self.pulse.still(), self.stopped + SPARE_SECONDS
        if not self.timeout or still <= max(0.0, self.timeout - ahead):
            self.step_down()
            return None
        if self.rules_after is None:
            self.rules_after = self.elect(self.pulse.folder)
        if still <= self.rules_after - ahead:
            return None
        if self.hears_since is None:
            self.hears_since = self.clock.seconds
        beats = self.beats()
        if still <= self.rules_after or self.clock.seconds - self.hears_since <= self.stopped:
            return None
        return suspects(beats, self.stopped), beats

    def elect(self, folder: Path) -> float:
        """Become the judge if nobody is; returns after how many seconds without progress this rank rules."""
        try:
            open(folder / "judge", "x").close()
            self.elected = True
        except FileExistsError:
            return self.timeout + JUDGEMENT_SECONDS
        except OSError:  # a full disk is no reason to hang
            pass
        return self.timeout

    def step_down(self) -> None:
        """There was progress after all."""
        if self.elected:
            with contextlib.suppress(OSError):
                (self.pulse.folder / "judge").unlink(missing_ok=True)
        self.elected, self.rules_after, self.hears_since = False, None, None

    def beats(self) -> list[Heartbeat]:
        """The last word of every rank that has announced itself and is not done; where no file can be read, our own."""
        found = (self.listener.last_word(place.rank) for place in self.places)
        return [beat for beat in found if beat is not None] or [self.pulse.word()]


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
    """Whom the others wait for, and where it is."""
    seconds = f"for more than {timeout:g} seconds (--hang-timeout)"
    places = "; ".join(f"{beat} in step {beat.step + 1}, {beat.part}, at {beat.where}" for beat in hung)
    if len(hung) < len(beats) or len(beats) == 1:
        return f"{places} hangs: no progress {seconds}"
    return f"no rank makes progress {seconds} and none stands out: {places}"
