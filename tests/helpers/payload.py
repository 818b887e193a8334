"""A pickle that creates a file when it is read, as a harmful one would do worse."""

import pickle
from pathlib import Path

from helpers.runs import reseal


class Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def plant(checkpoint: Path, name: str, marker: Path) -> None:
    """Put one in the place of a checkpoint's file, and seal the checkpoint as its maker would."""
    (checkpoint / name).write_bytes(pickle.dumps(Payload(marker)))
    reseal(checkpoint, name)
