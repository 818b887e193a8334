"""The arguments that Megatron-LM saves beside a checkpoint, read without executing anything.

`common.pt` is a zip with a pickle of many things. Numbers, texts and containers are read; whatever else it names, a
class of the upstream's or a tensor, comes as an `Unknown`, which does nothing.
"""

import argparse
import collections
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from slope_megatron.storage.metadata import Unpickler

NAME = "common.pt"


class Unknown:
    """What is not read."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


KNOWN = {("argparse", "Namespace"): argparse.Namespace, ("collections", "OrderedDict"): collections.OrderedDict}


class _Inert(Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        return KNOWN.get((module, name), Unknown)

    def persistent_load(self, key: Any) -> Unknown:
        """A tensor's bytes."""
        return Unknown()

    def load_build(self) -> None:
        """Set attributes of instances that were made here, never of a class."""
        if type(self.stack[-2]) in (argparse.Namespace, Unknown):
            pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]
        else:
            self.stack.pop()

    dispatch[pickle.BUILD[0]] = load_build


def read(folder: Path) -> dict[str, Any]:
    """What `common.pt` of a checkpoint's folder holds: `args`, `iteration`.

    Raises:
        ValueError: there is no such file, or it holds no arguments.
    """
    path = folder / NAME
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(pickled) as stream:
                found = _Inert(stream).load()
    except Exception as error:  # damaged pickles fail in many ways
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): give a checkpoint of Megatron-LM as it wrote it"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("args"), argparse.Namespace):
        raise ValueError(f"{path} holds no arguments: give a checkpoint of Megatron-LM as it wrote it")
    return found
