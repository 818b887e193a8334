"""Progress of a benchmark on stderr, a line a phase with the seconds so far; and its budget of seconds.

A job's time on GPUs may end before the benchmark does: whoever reads its log then must see what it was doing, and its
rows so far must be in the CSV.
"""

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slope_megatron", "slope_kernels")


class Clock:
    """Seconds since the start of a benchmark; its processes share one start.

    Args:
        budget: seconds; None: as long as it takes.
        started: `time.monotonic()` of the start, one clock for all processes of a machine; None: now.
        speaks: whether this process is the one that prints.
    """

    def __init__(self, budget: float | None = None, started: float | None = None, speaks: bool = True):
        self.budget = budget
        self.started = time.monotonic() if started is None else started
        self.speaks = speaks

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds of the budget that are left, below 0 when it is spent; infinite without one."""
        return float("inf") if self.budget is None else self.budget - self.seconds()

    def over(self) -> bool:
        return self.left() <= 0

    def say(self, text: str) -> None:
        """A line, before what it names begins: the last line of a benchmark that stands still is where it stands."""
        if self.speaks:
            print(f"[{self.seconds():6.1f} s] {text}", file=sys.stderr, flush=True)

    def within(self, names: list) -> Iterator:
        """The first of `names`, and more as long as the budget lasts; those left out are named in one line."""
        for index, name in enumerate(names):
            if index and self.over():
                left_out = ", ".join(map(str, names[index:]))
                self.say(f"the {self.budget:.0f} s of --seconds are over: not measured: {left_out}")
                return
            self.say(str(name))
            yield name

    def show_log(self) -> None:
        """Log lines of our packages (which kernel was chosen, what is compiled) among this clock's own."""
        handler = SayingHandler(self)
        for name in PACKAGES:
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.propagate = False
            logger.handlers = [handler]


class SayingHandler(logging.Handler):
    """Hands log lines to a clock."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def emit(self, record: logging.LogRecord) -> None:
        self.clock.say(record.getMessage())


def add_budget(parser) -> None:
    """`--seconds`."""
    parser.add_argument(
        "--seconds",
        type=float,
        help="budget: what is not begun after so many seconds is left out; the CSV has what was measured",
    )


def begin(arguments, gpu: bool = True) -> Clock:
    """The clock of a benchmark that runs in this process; its first line is the machine.

    Raises:
        ValueError: it needs a `gpu`, and there is none to measure; or its results could not be written.
    """
    from slope_megatron.bench.common import machine, require_gpu

    if gpu:
        require_gpu()
    try:
        Path(arguments.out or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out is {arguments.out}: no folder can be made there ({error.strerror})") from None
    clock = Clock(arguments.seconds)
    clock.show_log()
    clock.say(machine())
    return clock
