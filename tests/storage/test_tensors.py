"""Checkpoints' tensors: checked as they are read, and nothing in them is executed."""

import os
import pickle

import pytest
import torch
from torch.distributed import checkpoint

from helpers.payload import Payload
from slope_megatron.storage import metadata, sums, tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {
    "a": torch.arange(600, dtype=torch.float32).view(20, 30),
    "b": torch.arange(64, dtype=torch.uint8),
    "c": torch.ones(7, dtype=torch.bfloat16),
    "plain": torch.Size((2, 3)),
}


def empty(*names):
    return {name: torch.empty_like(STATE[name]) for name in names or ("a", "b", "c")}


def save(folder, state=None, manifest=True):
    writer = tensors.SummingWriter(folder)
    checkpoint.save(dict(state or STATE), storage_writer=writer, no_dist=True)
    if manifest:
        sums.write_manifest(folder, writer.entries)
    return folder


def place_of(folder, name):
    """File, first byte and length of what is stored under `name`."""
    stored = checkpoint.FileSystemReader(folder).read_metadata().storage_data
    (found,) = (info for index, info in stored.items() if index.fqn == name)
    return folder / found.relative_path, found.offset, found.length


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_sums_are_taken_of_the_bytes_on_their_way(tmp_path):
    folder = save(tmp_path / "c")
    entries = sums.read_manifest(folder)
    assert sums.find_damage(folder) is None
    for name in ("a", "b", "c"):
        path, offset, length = place_of(folder, name)
        part = path.read_bytes()[offset : offset + length]
        assert entries[path.name]["parts"][str(offset)] == sums.sum_of(part)
    found = empty()
    tensors.read_tensors(found, tensors.CheckedReader(folder))
    assert all(torch.equal(found[name], STATE[name]) for name in found)


def test_a_reader_of_a_part_checks_that_part(tmp_path):
    folder = save(tmp_path / "c")
    path, offset, length = place_of(folder, "b")
    flip(path, offset + length // 2)
    tensors.read_tensors(empty("a"), tensors.CheckedReader(folder))
    said = f"{folder} is corrupt: its file {path.name} has another checksum in the {length} bytes from {offset} on; "
    with pytest.raises(sums.Damaged, match=f"{said}take another"):
        tensors.read_tensors(empty("b"), tensors.CheckedReader(folder, "take another"))


def test_without_parts_the_whole_file_is_checked(tmp_path):
    """Manifests of before have sums of files alone."""
    folder = save(tmp_path / "c", manifest=False)
    sums.write_manifest(folder)
    path, offset, length = place_of(folder, "b")
    flip(path, offset + length // 2)
    with pytest.raises(sums.Damaged, match=f"{path.name} has another checksum; copy it again"):
        tensors.read_tensors(empty("a"), tensors.CheckedReader(folder))


def test_without_sums_it_is_read_and_the_log_says_so(tmp_path, caplog):
    folder = save(tmp_path / "c", manifest=False)
    with caplog.at_level("INFO"):
        tensors.read_tensors(found := empty(), tensors.CheckedReader(folder))
    assert torch.equal(found["a"], STATE["a"])
    assert "carries no checksums: damage in it would go unnoticed" in caplog.text
    path, offset, _ = place_of(folder, "a")
    with open(path, "r+b") as stream:
        stream.truncate(offset + 100)
    with pytest.raises(sums.Damaged, match=r"its file .*\.distcp is cut"):
        tensors.read_tensors(empty("a"), tensors.CheckedReader(folder))


def test_a_damaged_index(tmp_path):
    folder = save(tmp_path / "c")
    flip(folder / ".metadata", 200)
    with pytest.raises(sums.Damaged, match=r"its file \.metadata has another checksum"):
        tensors.CheckedReader(folder).read_metadata()


def test_a_disk_that_fails_in_the_middle(tmp_path, monkeypatch):
    folder = save(tmp_path / "c")
    reader = tensors.CheckedReader(folder)

    def fail(*_):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(reader, "_slice_file", fail)
    with pytest.raises(sums.Damaged, match=r"cannot be read \(Input/output error\)"):
        tensors.read_tensors(empty("a"), reader)


# -- nothing is executed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("wrap", [lambda payload: payload, lambda payload: {"state_dict_metadata": payload}])
def test_an_index_that_would_run_code_is_refused(tmp_path, protocol, wrap):
    folder = save(tmp_path / "c", manifest=False)
    (folder / ".metadata").write_bytes(pickle.dumps(wrap(Payload(tmp_path / "ran")), protocol))
    with pytest.raises(metadata.Refused, match=r"asks for .*which may run code: nothing was executed; use"):
        tensors.CheckedReader(folder).read_metadata()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"cbuiltins\ngetattr\n(cbuiltins\nset\nS'__class__'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x08Size.mro\x93.",
        b"\x80\x04\x8c\x13torch.serialization\x8c\x04load\x93.",
        b"ctorch.serialization\n_get_layout\n(S'torch.load'\ntR.",
    ],
)
def test_roads_around_the_list_are_closed(tmp_path, code):
    with pytest.raises(metadata.Refused):
        metadata.read_metadata(code, tmp_path / ".metadata")


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps([3])[:-1]])
def test_an_index_that_is_none(tmp_path, content):
    with pytest.raises(ValueError, match=r"\.metadata is (damaged|no index of a distributed checkpoint)"):
        metadata.read_metadata(content, tmp_path / ".metadata")


def test_torchs_own_index_reads_the_same(tmp_path):
    folder = save(tmp_path / "c")
    ours, torchs = tensors.CheckedReader(folder).read_metadata(), checkpoint.FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == torchs.state_dict_metadata
    assert ours.storage_data == torchs.storage_data and ours.planner_data == torchs.planner_data


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_an_index_of_torch_before_2_3_is_read(tmp_path, protocol):
    """Two of its classes lay elsewhere then."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    index = checkpoint.FileSystemReader(save(tmp_path / "c")).read_metadata()
    for name in ("a", "b", "c"):
        stored = index.state_dict_metadata[name]
        stored.properties = TensorProperties(dtype=stored.properties.dtype)
    found = metadata.read_metadata(pickle.dumps(index, protocol), tmp_path / ".metadata")
    assert found.state_dict_metadata["c"].properties.dtype == torch.bfloat16


def test_an_object_among_the_tensors_that_would_run_code_is_refused(tmp_path):
    """An index may call a tensor an object, which torch's planner unpickles freely."""
    folder = save(tmp_path / "c", {**STATE, "plain": Payload(tmp_path / "ran")})
    state = {"plain": torch.zeros(3)}
    with pytest.raises(metadata.Refused, match=r"holds 'plain', which is no plain data .* nothing was executed"):
        tensors.read_tensors(state, tensors.CheckedReader(folder))
    assert not (tmp_path / "ran").exists()


def test_objects_of_plain_data_are_read(tmp_path):
    state = {"plain": None}
    tensors.read_tensors(state, tensors.CheckedReader(save(tmp_path / "c")))
    assert state == {"plain": (2, 3)}
