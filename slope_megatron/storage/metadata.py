"""`.metadata` of torch's distributed checkpoints, which is a pickle, read without executing anything.

A pickle names the classes and functions that build what it holds, and Python's own reader calls whatever it names. This
one knows the few names that torch and megatron-core write there (torch 2.0 to 2.13), and none that acts. It also sets
attributes of the objects that it has built alone: a class or function that it names belongs to the whole process.
"""

import collections
import io
import pathlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed._shard.sharded_tensor import metadata as metadata_of_before
from torch.distributed.checkpoint import filesystem, metadata, planner

NAME = ".metadata"
MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
CLASSES = (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    # The ranks' plans, which megatron-core keeps beside it.
    planner.SavePlan,
    planner.WriteItem,
    planner.WriteItemType,
    planner.TensorWriteData,
    planner.BytesIOWriteData,
    # Where torch had these two before 2.3.
    metadata_of_before.TensorProperties,
    metadata_of_before.MEM_FORMAT_ENCODING,
)
ENUMERATIONS = (metadata._MEM_FORMAT_ENCODING, metadata_of_before.MEM_FORMAT_ENCODING, planner.WriteItemType)
# Whose instances have attributes of their own; the members of an enumeration are everybody's.
BUILT = {*CLASSES, collections.OrderedDict} - set(ENUMERATIONS)


class Refused(ValueError):
    """A file asks for what no checkpoint needs: it may have been made to run code."""


def member(owner: Any, name: str) -> Any:
    """How Python 3.11.0 to 3.11.3 pickle a member of an enumeration: by `getattr`."""
    if owner not in ENUMERATIONS:
        raise Refused(f"getattr of {owner!r}")
    return owner[name]


def layout(name: str) -> torch.layout:
    """`torch.strided` and its like, by name."""
    # Not by `getattr`, which imports parts of torch that are loaded on demand.
    found = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise Refused(f"a layout named {name!r}")
    return found


ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__qualname__): kind for kind in CLASSES},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): layout,
    ("builtins", "getattr"): member,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): collections.OrderedDict,
    # megatron-core's own of before 0.16: the same fields, and plans beside them.
    (MEGATRON, "MCoreMetadata"): metadata.Metadata,
    (MEGATRON, "MCoreSavePlan"): planner.SavePlan,
    # Where the writer's checkpoint lay.
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}


class Unpickler(pickle._Unpickler):
    """Builds what `ALLOWED` names and refuses the rest.

    Python's reader in Python: the one in C does not let a subclass see whose attributes are set.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise Refused(f"{module}.{name}") from None

    def get_extension(self, code: int) -> Any:
        """A name by its number in a table of this process, which is looked up past `find_class` the second time."""
        raise Refused(f"extension {code}")

    def load_build(self) -> None:
        """Set attributes of what was built here, and never of a class, a function or a constant."""
        target = self.stack[-2]
        if type(target) not in BUILT:
            raise Refused(f"attributes of {target!r}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(content: bytes, path: Path) -> metadata.Metadata:
    """
    Args:
        content: of the file at `path`.
    Raises:
        Refused: it names something that no checkpoint needs; nothing of it was executed.
        ValueError: it is no such file.
    """
    try:
        found = Unpickler(io.BytesIO(content)).load()
    except Refused as error:
        raise Refused(
            f"{path} asks for {error}, which no checkpoint's index needs and which may run code: nothing was executed; "
            "use a checkpoint whose origin you trust"
        ) from None
    except Exception as error:  # damaged pickles fail in many ways
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): copy it again") from None
    if not isinstance(found, metadata.Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise ValueError(f"{path} is no index of a distributed checkpoint: copy it again")
    return found
