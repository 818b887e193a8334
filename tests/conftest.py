"""Fixtures that more than one folder of tests uses."""

import logging
import os

import pytest

# Where they assert, they say as much as tests do.
pytest.register_assert_rewrite("helpers")
# One thread a process: tests run several ranks on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch  # noqa: E402, after the number of its threads

if not torch.cuda.is_available():
    # Read when a kernel is defined, and Triton defines some of its own as soon as anybody imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

LOGGERS = (logging.root, logging.getLogger("slope_megatron"))


@pytest.fixture(autouse=True)
def seeded(request):
    """Tests that name no generator draw the same numbers in each run, alone or among others."""
    from helpers.seeds import seed_everything, seed_of

    seed_everything(seed_of(request.node.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Give back, after each test and what it set up, what code sets for its whole process.

    `slope pretrain` writes its rank into the environment; every command sets up logging, a rank that is not the first
    one for errors alone.
    """
    environment, folder = dict(os.environ), os.getcwd()
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    handlers, levels = logging.root.handlers[:], [logger.level for logger in LOGGERS]
    result = yield
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    os.chdir(folder)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    logging.root.handlers[:] = handlers
    for logger, level in zip(LOGGERS, levels, strict=True):
        logger.setLevel(level)
    return result


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("this machine has no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    from helpers.seeds import seed_of

    report = yield
    if report.failed:
        report.sections.append(("random numbers", f"helpers.seeds.seed_everything({seed_of(item.nodeid)})"))
    return report


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
