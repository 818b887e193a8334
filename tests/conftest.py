"""Fixtures that more than one folder of tests uses."""

import os

import pytest

# Where they assert, they say as much as tests do.
pytest.register_assert_rewrite("helpers")
# One thread a process: tests run several ranks on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def ranks():
    """`ranks.run(function, *arguments, world=, tensor_parallel=)`: see helpers.distributed."""
    from helpers.distributed import RankPool

    return RankPool()


@pytest.fixture(scope="session")
def gpu_ranks():
    """The same over NCCL, a GPU a rank; a test that wants more than there are is skipped with the reason."""
    from helpers.distributed import RankPool

    return RankPool("cuda")
