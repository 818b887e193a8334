"""Processes forked from servers that have imported the frameworks, which takes longer than most tests.

CPU    multiprocessing's own server; it sees no GPU
CUDA   a second one beside it, which sees the GPUs and never touches them: a process that has touched CUDA cannot be
       forked. torch then looks for GPUs through NVML, and whether a forked process can use one is tried first
"""

import functools
import multiprocessing
import os
import sys
import warnings
from multiprocessing import context, forkserver
from unittest import mock

PRELOADED = ["helpers.imported"]
TRY_SECONDS = 120
# Compiling costs more than these tests gain. Not for the process of the tests itself, some of which compile.
WITHOUT_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
GPU_ENVIRONMENT = {
    **WITHOUT_COMPILER,
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # As launch/pretrain.sbatch has it: kernels of one stream start in the order in which they were asked for.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def start_server(server, **environment: str) -> None:
    # A server sees the environment, not this process's import path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    server.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, environment):
        server.ensure_running()


def fork_server():
    """A multiprocessing context for processes that see no GPU."""
    start_server(forkserver, CUDA_VISIBLE_DEVICES="", **WITHOUT_COMPILER)
    return multiprocessing.get_context("forkserver")


@functools.cache
def gpu_server() -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    start_server(server, **GPU_ENVIRONMENT)
    return server


class GpuProcess(context.ForkServerProcess):
    """Forked from `gpu_server()`."""

    def start(self) -> None:
        with mock.patch.object(forkserver, "connect_to_new_process", gpu_server().connect_to_new_process):
            super().start()


class GpuContext(context.ForkServerContext):
    """A multiprocessing context of such processes."""

    Process = GpuProcess


def touch_gpu() -> None:
    """Ends with code 0 where this process can use a GPU."""
    import torch

    assert torch.ones(2, device="cuda").sum().item() == 2.0
    os._exit(0)


def gpu_context(attempt=touch_gpu):
    """A multiprocessing context for processes that use GPUs: forked; where `attempt` shows that this fails, spawned."""
    process = GpuContext().Process(target=attempt)
    process.start()
    process.join(TRY_SECONDS)
    if process.exitcode == 0:
        return GpuContext()
    process.kill()
    warnings.warn(
        f"a forked process cannot use a GPU here (exit code {process.exitcode}): "
        "each rank starts from nothing, which takes some 20 s a call",
        stacklevel=2,
    )
    os.environ.update(GPU_ENVIRONMENT)
    return multiprocessing.get_context("spawn")
