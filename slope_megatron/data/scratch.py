"""Nothing is ever half-written: work in a hidden sibling folder, then rename."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder on the same file system as `target`, gone afterwards whatever happens.

    Raises:
        ValueError: the parent folder cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as failure:
        raise ValueError(
            f"{target.parent} cannot be written to ({failure.strerror}): choose a folder you may write to"
        ) from failure
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def move_into_place(finished: Path, target: Path) -> None:
    """Rename `finished`, a folder in the scratch folder, to `target`; what was there goes with the scratch folder."""
    old = finished.parent / "replaced"
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(finished, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
