"""Runs of a study as processes, several at once; each ends in a row, a failure that is named, or unfinished.

Every run is a `slope pretrain --auto-resume` of its own, which takes this process for its launcher: should this process
be killed, its runs save and end. A run that is stopped goes on from its checkpoint in the next call.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from slope_megatron.bench.progress import Clock
from slope_megatron.storage.metrics_file import read_metrics
from slope_megatron.study.outcome import diverged_row, done_row, last_words
from slope_megatron.study.rows import Rows
from slope_megatron.study.runs import Run, millions

PRETRAIN = (sys.executable, "-m", "slope_megatron", "pretrain", "--brief", "--auto-resume", "--config")
# Its exit codes.
DIVERGED, STOPPED_EARLY = 65, 75
# With less left of the budget no run is begun: it would not reach its first steps.
LEAST_SECONDS = 30.0
# For runs that were told to stop, to save; then they are killed, and go on from an earlier checkpoint.
SAVING_SECONDS = 45.0
POLL_SECONDS, STATUS_SECONDS = 0.2, 30.0


@dataclasses.dataclass
class Started:
    """A run that is being trained."""

    run: Run
    folder: Path
    process: subprocess.Popen
    began: float

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
        self.spoken = clock.seconds()

    def do(self) -> None:
        """Until nothing can be begun and nothing runs, or the budget is spent; stops what runs in any case."""
        try:
            while True:
                self.take_finished()
                if self.clock.over():
                    self.clock.say("the budget is spent: runs save and stop; the same command goes on with them")
                    break
                self.begin()
                if not self.running:
                    break
                self.say_status()
                time.sleep(POLL_SECONDS)
        finally:
            self.stop()

    def todo(self) -> list[Run]:
        """Runs without a row that have not failed in this call; also those that wait for a learning rate."""
        return [run for run in self.plan() if run.lr is None or not self.has_row(run)]

    def has_row(self, run: Run) -> bool:
        return self.rows.find(run.key) is not None

    def begin(self) -> None:
        """Give each free slot a run."""
        free = [slot for slot in range(len(self.place.slots)) if slot not in self.running]
        if not free:
            return
        if self.clock.left() < LEAST_SECONDS:
            if not self.running:
                self.clock.say(f"less than {LEAST_SECONDS:.0f} s of the budget are left: no run is begun")
            return
        busy = {started.run.key for started in self.running.values()} | self.failed.keys()
        for run in self.todo():
            if run.lr is None or run.key in busy:
                continue
            busy.add(run.key)
            slot = free.pop(0)
            self.start(run, slot)
            if not free:
                return

    def start(self, run: Run, slot: int) -> None:
        folder = run.folder(self.place.out)
        if (folder / "DONE").is_file():
            # An earlier call was killed before it had written the row.
            self.take(run, folder)
            return
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
        self.running[slot] = Started(run, folder, process, self.clock.seconds())
        where = "" if self.place.slots[slot] is None else f" on GPU {self.place.slots[slot]}"
        self.clock.say(f"begins{where}: {run.name}: {millions(run.tokens)} M tokens, lr {run.lr:g}")

    def environment(self, gpu: str | None) -> dict[str, str]:
        """Of a run: the only rank there is, on its GPU, on its share of the cores."""
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        cores = max(1, (os.cpu_count() or 1) // len(self.place.slots))
        own = {**os.environ, **alone, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
        return own if gpu is None else {**own, "CUDA_VISIBLE_DEVICES": gpu}

    def take_finished(self) -> None:
        """The rows of runs that have ended; those that failed are named."""
        for slot, started in list(self.running.items()):
            code = started.process.poll()
            if code is None:
                continue
            del self.running[slot]
            run, folder = started.run, started.folder
            if code == 0 or (folder / "DONE").is_file():
                self.take(run, folder)
            elif code == DIVERGED:
                self.rows.append(diverged_row(run, folder, self.place.at_once))
                self.clock.say(f"diverged: {run.name}")
            elif code == STOPPED_EARLY:
                self.failed[run.key] = f"{run.name} was stopped and is saved; the same command goes on with it"
            else:
                self.fail(run, f"ended with code {code}: {last_words(folder)}")

    def take(self, run: Run, folder: Path) -> None:
        """The row of a finished run; its checkpoints go once the row is on disk."""
        try:
            row = done_row(run, folder, self.place.at_once)
        except ValueError as error:
            self.fail(run, str(error))
            return
        self.rows.append(row)
        loss = "-" if row.val_loss is None else f"{row.val_loss:.4f}"
        self.clock.say(f"done: {run.name}: validation loss {loss}")
        if not self.place.keep_checkpoints:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def fail(self, run: Run, reason: str) -> None:
        self.failed[run.key] = f"{run.name} {reason}"
        self.clock.say(f"failed: {self.failed[run.key]}")

    def say_status(self) -> None:
        if self.clock.seconds() - self.spoken < STATUS_SECONDS:
            return
        self.spoken = self.clock.seconds()
        runs = self.plan()
        left = [run for run in runs if run.lr is None or not self.has_row(run)]
        running = "; ".join(started.progress() for started in self.running.values())
        self.clock.say(
            f"{len(runs) - len(left)} of {len(runs)} rows, about {self.minutes_left(left):.0f} min for the others; "
            f"running: {running}"
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
                self.take(started.run, started.folder)
