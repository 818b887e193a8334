"""Runs of a study as processes, several at once; each ends in a row, a failure that is named, or unfinished.

Every run is a `slope pretrain --auto-resume` of its own, which takes this process for its launcher: should this process
be killed, its runs save and end. A run that is stopped goes on from its checkpoint in the next call.
"""

import dataclasses
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from slope_megatron.bench.progress import Clock
from slope_megatron.data.prepare import available_cores
from slope_megatron.storage.metrics_file import read_metrics
from slope_megatron.study.outcome import diverged_row, done_row, last_words
from slope_megatron.study.rows import DIVERGED as DIVERGED_ROW
from slope_megatron.study.rows import Row, Rows
from slope_megatron.study.runs import Run, millions

PRETRAIN = (sys.executable, "-m", "slope_megatron", "pretrain", "--brief", "--auto-resume", "--config")
# Its exit codes.
DIVERGED, STOPPED_EARLY = 65, 75
# Of a run that somebody else told to end: the next call goes on with it.
TOLD_TO_STOP = {STOPPED_EARLY, 143, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGUSR1}
# With less left of the budget no run is begun: it would not reach its first steps.
LEAST_SECONDS = 30.0
# For runs that were told to stop, to save; then they are killed, and go on from an earlier checkpoint.
SAVING_SECONDS = 45.0
POLL_SECONDS, STATUS_SECONDS = 0.2, 30.0


@dataclasses.dataclass
class Started:
    """A run that is being trained.

    Args:
        sharing: runs on its device, itself included, at each look.
    """

    run: Run
    folder: Path
    process: subprocess.Popen
    sharing: list[int] = dataclasses.field(default_factory=list)

    @property
    def at_once(self) -> int:
        """Runs on its device, most of the time."""
        return round(statistics.median(self.sharing or [1]))

    def progress(self) -> str:
        """In words: how far it is, by its metrics file."""
        try:
            lines, _ = read_metrics(self.folder / "metrics.jsonl")
        except OSError:
            lines = []
        losses = [line for line in lines if line.get("loss") is not None]
        if not losses:
            return f"{self.run.name} starting"
        return f"{self.run.name} {losses[-1]['step'] / self.run.config.train.steps:.0%} loss {losses[-1]['loss']:.3f}"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the runs read and write, and on what they run.

    Args:
        slots: the GPU of each run that may run at once, as CUDA_VISIBLE_DEVICES has it; None: the CPU.
        at_once: runs that share a device.
        keep_checkpoints: of finished runs too.
    """

    out: Path
    data: Path
    slots: tuple[str | None, ...]
    at_once: int
    keep_checkpoints: bool = False


class Work:
    """One call of `slope study`: starts runs, takes their rows, and stops them when the budget is spent.

    Args:
        plan: the runs as the rows so far tell them; asked again whenever a run may begin.
        minutes_left: an estimate for runs that are still to be done.
    """

    def __init__(
        self,
        plan: Callable[[], list[Run]],
        rows: Rows,
        place: Place,
        clock: Clock,
        minutes_left: Callable[[list[Run]], float],
    ):
        self.plan, self.rows, self.place, self.clock = plan, rows, place, clock
        self.minutes_left = minutes_left
        self.running: dict[int, Started] = {}
        self.failed: dict[str, str] = {}
        self.stopped: dict[str, str] = {}
        self.spoken = clock.seconds()

    def do(self) -> None:
        """Until nothing can be begun and nothing runs, or the budget is spent; stops what runs in any case."""
        try:
            while True:
                self.take_finished()
                if self.clock.over():
                    self.clock.say("the budget is spent: runs save and stop; the same command goes on with them")
                    break
                taken = self.begin()
                if not self.running and not taken:
                    break
                self.note_sharing()
                self.say_status()
                time.sleep(POLL_SECONDS)
        finally:
            self.stop()

    def todo(self) -> list[Run]:
        """Runs without a row; also those that wait for a learning rate, and those that failed in this call."""
        return [run for run in self.plan() if run.lr is None or not self.has_row(run)]

    def has_row(self, run: Run) -> bool:
        return self.rows.find(run.key) is not None

    def begin(self) -> bool:
        """Give each free slot a run.

        Returns:
            whether rows were taken of runs that an earlier call ended and was killed before it wrote them: other runs
            may wait for these.
        """
        free = [slot for slot in range(len(self.place.slots)) if slot not in self.running]
        if not free:
            return False
        if self.clock.left() < LEAST_SECONDS:
            if not self.running:
                self.clock.say(f"less than {LEAST_SECONDS:.0f} s of the budget are left: no run is begun")
            return False
        taken = False
        busy = {started.run.key for started in self.running.values()} | self.failed.keys() | self.stopped.keys()
        for run in self.todo():
            if run.lr is None or run.key in busy:
                continue
            busy.add(run.key)
            folder = run.folder(self.place.out)
            if (folder / "DONE").is_file():
                self.take(run, folder, self.place.at_once)
                taken = True
                continue
            self.start(run, folder, free.pop(0))
            if not free:
                break
        return taken

    def start(self, run: Run, folder: Path, slot: int) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        settings, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
        run.write_settings(settings, self.place.data, folder)
        with open(log, "a") as output:
            # A session of its own: an interruption from the keyboard reaches this process alone, which stops the runs.
            process = subprocess.Popen(
                [*PRETRAIN, str(settings)],
                env=self.environment(self.place.slots[slot]),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running[slot] = Started(run, folder, process)
        where = "" if self.place.slots[slot] is None else f" on GPU {self.place.slots[slot]}"
        self.clock.say(f"begins{where}: {run.name}: {millions(run.tokens)} M tokens, lr {run.lr:g}")

    def environment(self, gpu: str | None) -> dict[str, str]:
        """Of a run: the only rank there is, on its GPU, on its share of the cores."""
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        cores = max(1, available_cores() // len(self.place.slots))
        own = {**os.environ, **alone, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
        return own if gpu is None else {**own, "CUDA_VISIBLE_DEVICES": gpu}

    def take_finished(self) -> None:
        """The rows of runs that have ended; those that failed or were stopped are named."""
        for slot, started in list(self.running.items()):
            code = started.process.poll()
            if code is None:
                continue
            del self.running[slot]
            run, folder = started.run, started.folder
            if code == 0 or (folder / "DONE").is_file():
                self.take(run, folder, started.at_once)
            elif code == DIVERGED:
                self.add(diverged_row(run, folder, started.at_once), folder)
            elif code in TOLD_TO_STOP:
                self.stopped[run.key] = f"{run.name} was stopped; the same command goes on with it"
                self.clock.say(self.stopped[run.key])
            else:
                self.fail(run, f"ended with code {code}: {last_words(folder)}")

    def take(self, run: Run, folder: Path, at_once: int) -> None:
        """The row of a finished run."""
        try:
            row = done_row(run, folder, at_once)
        except ValueError as error:
            self.fail(run, str(error))
            return
        self.add(row, folder)

    def add(self, row: Row, folder: Path) -> None:
        """A row to the file; once it is there, the run's checkpoints go."""
        self.rows.append(row)
        diverged = row.outcome == DIVERGED_ROW
        self.clock.say(f"diverged: {row.name}" if diverged else f"done: {row.name}: validation loss {row.val_loss:.4f}")
        if not self.place.keep_checkpoints:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def fail(self, run: Run, reason: str) -> None:
        self.failed[run.key] = f"{run.name} {reason}"
        self.clock.say(f"failed: {self.failed[run.key]}")

    def note_sharing(self) -> None:
        devices = [self.place.slots[slot] for slot in self.running]
        for slot, started in self.running.items():
            started.sharing.append(devices.count(self.place.slots[slot]))

    def say_status(self) -> None:
        if self.clock.seconds() - self.spoken < STATUS_SECONDS:
            return
        self.spoken = self.clock.seconds()
        # Equal settings in two groups are trained once.
        runs, left = ({run.key: run for run in some} for some in (self.plan(), self.todo()))
        running = "; ".join(started.progress() for started in self.running.values())
        minutes = self.minutes_left(list(left.values()))
        self.clock.say(
            f"{len(runs) - len(left)} of {len(runs)} rows, about {minutes:.0f} min for the others; running: {running}"
        )

    def stop(self) -> None:
        """Tell what runs to save and end, wait, and take what has reached its end meanwhile."""
        for started in self.running.values():
            started.process.terminate()
        deadline = time.monotonic() + SAVING_SECONDS
        for started in self.running.values():
            try:
                started.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                started.process.kill()
                started.process.wait()
        for slot, started in list(self.running.items()):
            del self.running[slot]
            if (started.folder / "DONE").is_file():
                self.take(started.run, started.folder, started.at_once)
