"""Checkpoints while training goes on: a thread of each rank writes, the step loop only begins and finishes.

A thread, not a process: when its rank is killed it is gone too, its errors are ordinary exceptions, and nothing is
forked from a process that holds a GPU and process groups. It spends its time in system calls and checksums, which
leave the interpreter to the step loop.
"""

import logging
import threading
from pathlib import Path

from slope_megatron.training.checkpoint import store
from slope_megatron.training.engine import Engine

logger = logging.getLogger(__name__)
# `failure` of a run that is not to be saved.
UNWANTED = "--save-interval is 0"


class Saver:
    """Saves an engine's state to a run folder; every method is called by all ranks together, but `busy`.

    Attributes:
        failure: why the newest state is not on disk; None: it is. `UNWANTED`: no state is written in this run.
    """

    def __init__(self, engine: Engine, run: Path):
        self.engine, self.run = engine, run
        self.background = engine.config.train.async_save
        self.saving: store.Saving | None = None
        self.thread: threading.Thread | None = None
        self.failure: str | None = None
        if not engine.config.train.save_interval:
            self.failure = UNWANTED
            logger.info("no checkpoint is written (%s)", UNWANTED)

    def busy(self) -> bool:
        """Whether this rank's thread still writes."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not finished; the same on every rank."""
        return self.saving is not None

    def save(self) -> None:
        """Begin a checkpoint of the present step, once the last one is finished; nothing where none is wanted."""
        if self.failure == UNWANTED:
            return
        self.finish()
        self.saving = store.Saving(self.engine, self.run)
        if self.background:
            self.thread = threading.Thread(target=self.saving.write, name="checkpoint-writer", daemon=True)
            self.thread.start()
        else:
            self.saving.write()
            self.finish()

    def save_at_once(self) -> str | None:
        """A checkpoint of the present step that the run itself goes on from, also where none is wanted.

        Returns:
            why it could not be written, as `failure`.
        """
        unwanted = self.failure == UNWANTED
        self.finish()
        self.saving = store.Saving(self.engine, self.run)
        self.saving.write()
        self.finish(goes_on="")
        failure = self.failure
        if unwanted:
            self.failure = failure or UNWANTED
        return failure

    def finish(self, goes_on: str = "; the run goes on") -> None:
        """Wait for the save that has begun, if one has, and publish it.

        Args:
            goes_on: ends the line in the log on a failure.
        """
        if self.saving is None:
            return
        if self.thread is not None:
            self.thread.join()
        self.failure = self.saving.finish()
        name = self.saving.target.name
        if not self.failure:
            logger.info("checkpoint %s is saved", name)
        else:
            kept = store.newest_known(self.run)
            safe = f"{kept.name} is kept" if kept else "there is none before it"
            logger.error("checkpoint %s could not be written (%s): %s%s", name, self.failure, safe, goes_on)
        self.saving = self.thread = None
