"""Data that is not what was prepared ends a run in one sentence: before it trains, or once it has been read."""

import shutil

import pytest
from test_pretrain import MODEL, RUN

from helpers import commands


@pytest.fixture
def data(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "data")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def read_all_later():
    from slope_megatron.training import data_check

    data_check.AT_ONCE = 0


def pretrain(data, run, *arguments, before=None):
    return commands.slope("pretrain", "--data", data, *MODEL, *RUN, "--out", run, *arguments, before=before)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "tokenizer.model"])
def test_before_it_trains(data, tmp_path, name):
    flip(data / name)
    done = pretrain(data, tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1
    assert f"{data / name} is not the file that was written (it has another checksum): copy it again, or" in said[0]


def test_while_it_trains(data, tmp_path):
    """As where the data is large; what was trained on it is named, and nothing more is saved."""
    whole = pretrain(data, tmp_path / "whole", "--stop-at", 2, before=read_all_later)
    assert whole.returncode == 0, whole.stderr
    flip(data / "train.bin")
    shutil.rmtree(data / "cache")
    done = pretrain(data, tmp_path / "run", "--save-interval", 100, before=read_all_later)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr
    assert "train.bin is not the file that was written (it has another checksum)" in said[0]
    assert "The run stops after step" in said[0] and "once the data is whole go on with --resume" in said[0]
    assert not (tmp_path / "run" / "DONE").exists()


def both_see(folder, copies):
    """Whether each of two ranks reads for all."""
    import torch.distributed as dist

    from slope_megatron.data.manifest import load_manifest
    from slope_megatron.training import data_check

    asked = []
    data_check.DataCheck.compare = lambda self, names: asked.append(names)
    own = copies[dist.get_rank()]
    files = load_manifest(own)["files"]
    data_check.DataCheck(own, {name: entry["bytes"] for name, entry in files.items()})
    return len(asked)


def test_one_rank_reads_for_all_that_see_the_same_files(ranks, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    assert ranks.run(both_see, data, [data, data], world=2) == [1, 0]
    assert ranks.run(both_see, data, [data, other], world=2) == [1, 1]


def heard_of_a_sick_disk(folder, error, large):
    """What this rank hears where every byte that is read fails: at once, or of the thread."""
    from slope_megatron.data import manifest
    from slope_megatron.training import data_check

    def fail(*_):
        raise error

    sizes = {name: entry["bytes"] for name, entry in manifest.load_manifest(folder)["files"].items()}
    manifest.verify = fail
    data_check.AT_ONCE = 0 if large else 1 << 30
    if not large:
        try:
            data_check.DataCheck(folder, sizes)
        except ValueError as refused:
            return str(refused)
        return None
    data_check.DataCheck.compare, compare = lambda self, names: None, data_check.DataCheck.compare
    check = data_check.DataCheck(folder, sizes)
    if check.thread:
        check.thread.join()
        data_check.DataCheck.compare = compare
        check.compare_later(set())
    return check.problem


def test_a_disk_that_cannot_be_read_is_no_whole_data(ranks, data):
    said = f"{data} cannot be read (Input/output error): make it readable, or put it on another disk"
    error = OSError(5, "Input/output error")
    assert ranks.run(heard_of_a_sick_disk, data, error, False, world=2) == [said, said]
    assert ranks.run(heard_of_a_sick_disk, data, error, True, world=2) == [said, None]


def test_a_reader_that_breaks_says_so(ranks, data):
    [said, nothing] = ranks.run(heard_of_a_sick_disk, data, MemoryError("no room"), True, world=2)
    assert "could not be compared with what was written (" in said and "no room" in said and nothing is None
