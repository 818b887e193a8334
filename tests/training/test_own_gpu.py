"""Which GPU is a rank's own, where there are enough and where ranks share."""

import os

import pytest
import torch

from slope_megatron.training import parallel


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two; the list of those that were taken."""
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv(parallel.SHARE_GPUS, raising=False)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_HOSTID", "this")
    return taken


def be_rank(monkeypatch, rank, world, local_rank=None):
    for name, value in (
        ("RANK", rank),
        ("WORLD_SIZE", world),
        ("LOCAL_RANK", rank if local_rank is None else local_rank),
    ):
        monkeypatch.setenv(name, str(value))


def test_each_rank_has_the_gpu_of_its_number(two_gpus, monkeypatch):
    for rank in (0, 1):
        be_rank(monkeypatch, rank, 2)
        parallel.take_gpu()
    # The fourth rank of two machines.
    be_rank(monkeypatch, 3, 4, local_rank=1)
    parallel.take_gpu()
    assert two_gpus == [0, 1, 1] and os.environ["NCCL_HOSTID"] == "this"


def test_a_rank_too_many_is_told_what_to_do(two_gpus, monkeypatch):
    be_rank(monkeypatch, 2, 4)
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 2 and this rank sees 2 GPUs: start at most 2 .* SLOPE_SHARE_"):
        parallel.take_gpu()
    assert two_gpus == []


def test_ranks_that_share_are_machines_of_their_own_to_nccl(two_gpus, monkeypatch):
    monkeypatch.setenv(parallel.SHARE_GPUS, "1")
    for rank in range(4):
        be_rank(monkeypatch, rank, 4)
        monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", str(rank))
        parallel.take_gpu()
        assert os.environ["NCCL_HOSTID"] == f"rank{rank}"
        assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(rank % 2)
    assert two_gpus == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_ranks_that_need_not_share_do_not(two_gpus, monkeypatch, name):
    monkeypatch.setenv(parallel.SHARE_GPUS, "1")
    be_rank(monkeypatch, 1, 2)
    parallel.take_gpu()
    # The last of two machines with two ranks each.
    be_rank(monkeypatch, 3, 4, local_rank=1)
    monkeypatch.setenv(name, "2")
    parallel.take_gpu()
    assert two_gpus == [1, 1] and os.environ["NCCL_HOSTID"] == "this"


def test_the_only_gpu_that_a_task_sees_is_its_own(two_gpus, monkeypatch):
    """As with --gpus-per-task=1, seen through cgroups: no variable tells of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in range(4):
        be_rank(monkeypatch, rank, 4)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        parallel.take_gpu()
        assert os.environ["LOCAL_RANK"] == "0"
    assert two_gpus == [0, 0, 0, 0]


def test_some_gpus_but_too_few_are_refused_on_every_rank(two_gpus, monkeypatch):
    """--gpus-per-task=2: tasks 0 and 1 would take one of their own two each, tasks 2 and 3 none."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in range(4):
        be_rank(monkeypatch, rank, 4)
        with pytest.raises(ValueError, match=rf"LOCAL_RANK is {rank} of 4 and this rank sees 2 GPUs"):
            parallel.take_gpu()
    assert two_gpus == []
