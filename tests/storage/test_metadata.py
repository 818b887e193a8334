"""An index can name few things, and change none of them: they belong to the whole process."""

import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as torchs

from slope_megatron.storage import metadata

# Opcodes: a name, then a pair of no `__dict__` state and one attribute in slots, set by BUILD; what is left is popped.
NAMED = "c{}\n{}\n"
BUILD_SLOTS = b"N}X\x04\x00\x00\x00_strX\x09\x00\x00\x00/tmp/evils\x86b0"
BUILD_DICT = b"}X\x04\x00\x00\x00_strX\x09\x00\x00\x00/tmp/evilsb0"
GOOD = pickle.dumps(torchs.Metadata({}), protocol=2)[2:]


def whole_index() -> torchs.Metadata:
    chunk = torchs.ChunkStorageMetadata(torch.Size((0,)), torch.Size((4,)))
    stored = torchs.TensorStorageMetadata(torchs.TensorProperties(dtype=torch.bfloat16), torch.Size((4,)), [chunk])
    places = {torchs.MetadataIndex("a", torch.Size((0,)), 0): filesystem._StorageInfo("__0_0.distcp", 0, 8)}
    return torchs.Metadata({"a": stored, "b": torchs.BytesStorageMetadata()}, {"a": {1}}, places, torchs.StorageMeta())


def attributes() -> dict:
    """Of every class and function that an index can name, and of its classes' members."""
    named = [value for value in metadata.ALLOWED.values() if hasattr(value, "__dict__")]
    parts = [base for value in named if inspect.isclass(value) for base in value.__mro__]
    members = [member for enumeration in metadata.ENUMERATIONS for member in enumeration]
    return {id(each): dict(vars(each)) for each in (*named, *parts, *members) if hasattr(each, "__dict__")}


def refuse_without_a_trace(content: bytes) -> None:
    """It is refused as what may run code, and what every other reader of this process uses is as it was."""
    before = attributes()
    with pytest.raises(metadata.Refused, match=r"asks for .*nothing was executed"):
        metadata.read_metadata(content, Path(".metadata"))
    assert attributes() == before


@pytest.mark.parametrize("build", [BUILD_SLOTS, BUILD_DICT], ids=["slots", "dict"])
@pytest.mark.parametrize("name", metadata.ALLOWED, ids=".".join)
def test_nothing_that_is_named_gets_attributes(name, build):
    refuse_without_a_trace(b"\x80\x02" + NAMED.format(*name).encode() + build + GOOD)


@pytest.mark.parametrize(
    "reached",
    [
        # By the memo of either protocol, and by STACK_GLOBAL.
        b"cpathlib\nPosixPath\nq\x000h\x00",
        b"cpathlib\nPosixPath\n\x940h\x00",
        b"\x8c\x07pathlib\x8c\x09PosixPath\x93",
        # A member of an enumeration, and a type of numbers, are the process's, too.
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R",
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85\x81",
        b"(ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00o",
        b"(K\x00itorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n",
        b"cbuiltins\ngetattr\nctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
        b"X\x13\x00\x00\x00TORCH_CHANNELS_LAST\x86R",
        b"ctorch.serialization\n_get_layout\nX\x0d\x00\x00\x00torch.strided\x85R",
    ],
)
@pytest.mark.parametrize("build", [BUILD_SLOTS, BUILD_DICT], ids=["slots", "dict"])
def test_nor_by_other_roads(reached, build):
    refuse_without_a_trace(b"\x80\x02" + reached + build + GOOD)


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"], ids=["1", "2", "4"])
def test_names_by_number_are_refused_although_this_process_knows_them(opcode, monkeypatch):
    """Python keeps what a number stood for, and hands it out past `find_class`."""
    import copyreg

    monkeypatch.setitem(copyreg._extension_cache, 1, print)
    refuse_without_a_trace(b"\x80\x02" + opcode + b"0" + GOOD)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_ordinary_index_is_read(protocol):
    index = whole_index()
    if protocol < 3:
        index.planner_data = None  # Python 2's name of `set`, which torch never wrote
    assert metadata.read_metadata(pickle.dumps(index, protocol), Path(".metadata")) == index


@pytest.mark.parametrize("name", ["_dynamo", "load", "__class__", "float32"])
def test_a_layout_by_the_name_of_something_else(name):
    with pytest.raises(metadata.Refused, match="a layout named"):
        metadata.layout(name)


def test_plans_that_megatron_keeps_beside_the_index_are_read():
    """As megatron-core 0.16 writes them; and the class of its own that it had before."""
    index, chunk = whole_index(), torchs.ChunkStorageMetadata(torch.Size((0,)), torch.Size((4,)))
    data = planner.TensorWriteData(chunk, torchs.TensorProperties(dtype=torch.bfloat16), torch.Size((4,)))
    items = [
        planner.WriteItem(torchs.MetadataIndex("a"), planner.WriteItemType.SHARD, tensor_data=data),
        planner.WriteItem(torchs.MetadataIndex("b"), planner.WriteItemType.BYTE_IO),
    ]
    index.all_local_plans = [planner.SavePlan(items)]
    content = pickle.dumps(index)
    assert metadata.read_metadata(content, Path(".metadata")) == index
    own = (
        b"\x80\x02c"
        + f"{metadata.MEGATRON}\nMCoreMetadata\n".encode()
        + b")\x81}X\x13\x00\x00\x00state_dict_metadata}sb."
    )
    assert metadata.read_metadata(own, Path(".metadata")).state_dict_metadata == {}
