"""What an earlier command left is never lost to a later one: it moves into the folder `earlier` beside it."""

import itertools
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def set_aside(path: Path, reason: str) -> Path | None:
    """Move a file or folder to `earlier/NAME-1.SUFFIX` (or -2, ...), and log it; None: nothing is there."""
    if not os.path.lexists(path):
        return None
    folder = path.parent / "earlier"
    folder.mkdir(exist_ok=True)
    names = (folder / f"{path.stem}-{number}{path.suffix}" for number in itertools.count(1))
    target = next(name for name in names if not os.path.lexists(name))
    os.rename(path, target)
    logger.warning("%s: %s; it is kept as %s", path, reason, target)
    return target
