"""What earlier runs have chosen on this machine: where the measurement of a product begins.

A hint is never a choice: its candidate passes the numerics gate again and is timed beside the dense product. It saves
the search through a library's algorithms, which takes most of a second for a large product.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from slope_megatron.ops import choices
from slope_megatron.ops.choices import Choice, Key

_hints: dict[Key, Any] = {}


def find(key: Key) -> Choice | None:
    """What an earlier run has chosen for a product without adapters, if it is a sparse one.

    A weight that has been measured for other tokens keeps its library and its tiles, whatever was chosen then.
    """
    known, present = _hints.get(key), choices.earlier(key)
    if not isinstance(known, Choice) or known.library is None:
        return None
    fits = present is None or (present.library, present.tiles) == (known.library, known.tiles)
    return known if fits else None


def note(key: Key, choice: Choice) -> None:
    """Keep a choice that this run has made among all candidates."""
    _hints[key] = choice


def file_of_machine(folder: Path | None = None) -> Path:
    """Each kind of machine, GPU and versions of the libraries, has a file of its own.

    Args:
        folder: None: beside the compiled kernels of `slope_kernels.load_cuda`.
    """
    folder = folder or Path.home() / ".cache" / "slope-megatron" / "choices"
    machine = json.dumps(choices.machine(), sort_keys=True)
    return folder / f"{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def load(path: Path) -> None:
    """Take the hints of a file; none, with a log line, where it is damaged or another machine's."""
    _hints.clear()
    saved = choices.read(path) if path.exists() else None
    if saved is not None and choices.is_from_here(saved, path):
        _hints.update(choices.parsed(saved))


def save(path: Path) -> None:
    """Write what earlier runs have chosen, and this one.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    choices.save(path, _hints)
