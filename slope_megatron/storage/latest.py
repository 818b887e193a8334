"""`latest`, the small file beside a run's checkpoints that names the newest one."""

import logging
import os
from pathlib import Path

from slope_megatron.storage import earlier, whole

logger = logging.getLogger(__name__)
NAME = "latest"


def find(complete: list[Path]) -> Path:
    """The checkpoint that `latest` names; where it names none, the newest, and a line in the log says why.

    Args:
        complete: the complete checkpoints of one folder, oldest first; at least one.
    """
    pointer = complete[-1].with_name(NAME)
    try:
        name = pointer.read_bytes().decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        problem = "is gone"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    else:
        named = [folder for folder in complete if folder.name == name]
        if named:
            return named[0]
        problem = f"names {name!r}, which is no complete checkpoint" if name else "is empty"
    logger.warning("%s %s: taking the newest complete checkpoint, %s", pointer, problem, complete[-1].name)
    return complete[-1]


def point_at(checkpoint: Path) -> None:
    """Let `latest` name this checkpoint."""
    pointer = checkpoint.with_name(NAME)
    if os.path.isdir(pointer):
        earlier.set_aside(pointer, "a folder is where the name of the newest checkpoint belongs")
    whole.write_text(pointer, f"{checkpoint.name}\n")
