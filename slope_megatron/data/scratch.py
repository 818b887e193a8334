"""Nothing is ever half-written: work in a hidden sibling folder, then rename; what is long goes on where it stopped."""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slope_megatron.storage import locks, whole

logger = logging.getLogger(__name__)
IDENTITY = "identity.json"


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder on the same file system as `target`, gone afterwards whatever happens."""
    with _needs_writable(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def workspace_beside(target: Path, identity: dict) -> Iterator[Path]:
    """A folder beside `target` that outlives a killed process: the next one of the same `identity` finds it as it was.

    It is gone after success and after bad input (ValueError); other failures, and kills, leave it. One process holds
    it at a time.

    Raises:
        ValueError: the parent folder cannot be written to, or another process is at work here.
    """
    folder = target.with_name(f".{target.name}.preparing")
    with _needs_writable(target.parent):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    with lock:
        if not locks.take(lock, f"nothing keeps a second prepare from writing {target} too; start only one"):
            raise ValueError(f"another process is preparing {target}: wait for it, or choose another folder")
        _begin_or_continue(folder, identity)
        try:
            yield folder
        except ValueError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _begin_or_continue(folder: Path, identity: dict) -> None:
    try:
        before = json.loads((folder / IDENTITY).read_text())
    except (OSError, ValueError):
        before = None
    if before == identity:
        logger.info("an earlier prepare of the same text and settings stopped here: going on with what it finished")
        return
    if before is not None:
        logger.info("an earlier prepare stopped here, of other text, settings or versions: beginning anew")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    whole.write_json(folder / IDENTITY, identity)


@contextlib.contextmanager
def sealed_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which gets its name once it is full."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    os.rename(partial, folder)


def explain(failure: OSError, target: Path) -> str:
    """What a full disk or another failure of the machine means for an unfinished prepare."""
    work = target.with_name(f".{target.name}.preparing")
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"the disk of {target.parent} is full ({failure.strerror}): free some space"
    else:
        reason = f"it failed ({failure}): mend that"
    return f"{reason} and run the same command again; it goes on with what {work} holds"


@contextlib.contextmanager
def _needs_writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise ValueError(
            f"{folder} cannot be written to ({failure.strerror}): choose a folder you may write to"
        ) from failure
