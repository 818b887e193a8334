"""Is there room, and may we write? Asked before a run begins."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from slope_megatron.config import TrainConfig
from slope_megatron.training.checkpoint import store

GIB = 2**30
PROBE_BYTES = 1 << 16


def probe(run: Path) -> None:
    """Write, flush and remove a small file where the run folder is or will be.

    Raises:
        ValueError: that fails; one sentence.
    """
    folder = run
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".slope-probe-") as stream:
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}): make it writable, free some space, or give another --out"
        ) from None


def check_space(run: Path, checkpoint_bytes: int, train: TrainConfig, steps_done: int, switches: Sequence[int]) -> None:
    """Refuse a run whose checkpoints cannot fit: those it keeps and the one it is writing.

    Args:
        checkpoint_bytes: size of one checkpoint.
        steps_done: where the run goes on.
        switches: steps before which a checkpoint is written, whatever the interval.
    Raises:
        ValueError: says what is needed, what is free, and the way out.
    """
    last = train.last_step
    saves = sum(steps_done < step < last for step in switches)
    if train.save_interval:
        saves += -(-max(0, last - steps_done) // train.save_interval)
    if not saves:
        return
    there = len(store.complete_checkpoints(run))
    # While one is written, the newest `keep` are still there.
    recent = min(train.keep_checkpoints + 1, there + saves) if train.save_interval else there + saves
    keeps = train.keep_every if train.save_interval else None
    for_ever = last // keeps - steps_done // keeps if keeps else 0
    needed = max(0, recent + for_ever - min(there, recent)) * checkpoint_bytes
    free = shutil.disk_usage(run).free
    if needed > free:
        more = f" and {for_ever} for ever (--keep-every {train.keep_every})" if for_ever else ""
        raise ValueError(
            f"{run} has {free / GIB:.3g} GiB free and the run needs about {needed / GIB:.3g}: a checkpoint takes "
            f"{checkpoint_bytes / GIB:.3g}, {recent} are there at a time (--keep-checkpoints "
            f"{train.keep_checkpoints}, one more while it is written){more}; free some space, keep fewer, or give "
            "another --out"
        )
