"""The run folder: one run's configuration, metrics and checkpoints, never two runs mixed."""

import os
import platform
import socket
import sys
from pathlib import Path

from slope_megatron.config import Config
from slope_megatron.config.json_file import read_json
from slope_megatron.config.saved import saved_form
from slope_megatron.data.manifest import fingerprint
from slope_megatron.storage import folders, locks, sums, whole
from slope_megatron.training.checkpoint import store
from slope_megatron.versions import versions

LOCK = "lock"
DAMAGED_RUN = "copy it from a backup, or start anew with --overwrite or another --out"


class RunLock:
    """One writer for a run folder while this object lives; the kernel drops the lock when the process ends."""

    def __init__(self, run: Path):
        """Raises ValueError if another process holds it."""
        self.stream = open(run / LOCK, "a+", errors="replace")  # noqa: SIM115 - open as long as the lock is held
        risk = f"nothing keeps a second process from writing {run} too, which would spoil it; start only one"
        if not locks.take(self.stream, risk):
            self.stream.seek(0)
            holder = self.stream.read().strip() or "another process"
            self.stream.close()
            raise ValueError(f"{run} is being written by {holder}: wait for it to end, or give another --out")
        self.stream.truncate(0)
        self.stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.stream.flush()


def is_resumed(config: Config) -> bool:
    """Whether this run goes on from a checkpoint: as asked, or because `--auto-resume` finds one, whole or not.

    Raises:
        ValueError: `--resume`, and no run is there; or the folder of checkpoints cannot be listed.
    """
    run = Path(config.train.out)
    if config.train.auto_resume:
        # Damaged ones count: a run that none of them can be read of is not begun anew unasked.
        return bool(store.entries(run) or store.entries(run, store.SET_ASIDE))
    if config.train.resume and not (run / "run.json").is_file():
        raise ValueError(f"{run} holds no run to resume: leave --resume out to start one")
    return config.train.resume


def check_free(config: Config) -> None:
    """Refuse a folder that this run cannot be written to, before anything is loaded; rank 0 calls it.

    Raises:
        ValueError: a file or a link to nowhere is there, something that is no run, a run that is not to be continued
            or deleted, or `--resume` and no run.
    """
    run = Path(config.train.out)
    folders.output_folder(run, "--out")
    resumed = is_resumed(config)
    if folders.is_free(run, apart_from=(LOCK,)):
        return
    if not (run / "run.json").is_file():
        raise ValueError(f"{run} is not empty and holds no run of this program: give another --out")
    # Under --auto-resume, what is there has no checkpoint yet.
    if not (resumed or config.train.overwrite or config.train.auto_resume):
        raise ValueError(
            f"{run} holds a run already: give --resume to go on, --overwrite to delete it, or another --out"
        )


def open_run(config: Config, origins: dict[str, str], dtype: str) -> RunLock:
    """Create, reopen or replace the run folder; rank 0 calls it, and keeps the lock that it returns.

    Args:
        dtype: the parameter type that this machine's `auto` means; saved, and the same on resume.
    Raises:
        ValueError: the folder holds another run, or something that is no run.
    """
    run = Path(config.train.out)
    check_free(config)
    replaces = not folders.is_free(run, apart_from=(LOCK,))
    run.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run)  # a run in progress is neither joined nor deleted
    if replaces:
        if is_resumed(config):
            check_same_data(run, config)
            return lock
        folders.empty(run, keep=(LOCK,), last="run.json", follow=("checkpoints",))
    content = {
        **saved_form(config.to_dict()),
        "origins": origins,
        "dtype": dtype,
        "data_sha256": fingerprint(config.data.data),
        "command": sys.argv,
        "versions": versions(),
        "machine": platform.platform(),
    }
    whole.write_json(run / "run.json", sums.signed(content))
    return lock


def check_same_data(run: Path, config: Config) -> None:
    """The data may have moved, but must be what the run began with."""
    began_with = description(run, "data_sha256")["data_sha256"]
    if fingerprint(config.data.data) != began_with:
        raise ValueError(
            f"{config.data.data} is not the data that {run} began with: give that --data, or another --out"
        )


def saved_dtype(run: Path) -> str | None:
    """The parameter type of the run in this folder, if there is one."""
    return description(run, "dtype")["dtype"] if (run / "run.json").is_file() else None


def description(run: Path, *holds: str) -> dict:
    """run.json.

    Args:
        holds: keys that it must have.
    Raises:
        ValueError: it is not what was written.
    """
    path = run / "run.json"
    content = read_json(path, DAMAGED_RUN, holds=holds)
    if sums.is_signed_right(content) is False:
        raise ValueError(f"{path} is damaged (it has another checksum): {DAMAGED_RUN}")
    return content
