"""Ranks on GPUs are forked from a server of their own, or spawned where that fails: tried here without a GPU."""

import os
import subprocess
import sys

import pytest

from helpers import servers


def ends_well():
    os._exit(0)


def fails():
    os._exit(3)


def look(pipe):
    """What a process has and sees before it imports anything."""
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_NVML_BASED_CUDA_CHECK", "CUDA_VISIBLE_DEVICES")
    pipe.send((os.getppid(), "deepspeed" in sys.modules, {name: os.environ.get(name) for name in names}))


def seen_by(context):
    ours, theirs = context.Pipe()
    process = context.Process(target=look, args=(theirs,))
    process.start()
    assert ours.poll(300)
    process.join()
    return ours.recv()


def test_gpu_ranks_come_from_a_server_of_their_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu_parent, gpu_imported, gpu_environment = seen_by(servers.gpu_context(ends_well))
    cpu_parent, cpu_imported, cpu_environment = seen_by(servers.fork_server())
    assert gpu_imported and cpu_imported and gpu_parent != cpu_parent != os.getpid()
    assert list(gpu_environment.values())[:2] == ["1", "1"] and gpu_environment["CUDA_VISIBLE_DEVICES"] != ""
    assert cpu_environment["CUDA_VISIBLE_DEVICES"] == ""


def test_where_forked_processes_cannot_use_a_gpu_ranks_are_spawned(monkeypatch):
    for name in servers.GPU_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # what is set below is taken back
    with pytest.warns(UserWarning, match=r"cannot use a GPU here \(exit code 3\): each rank starts from nothing"):
        context = servers.gpu_context(fails)
    assert context.get_start_method() == "spawn" and os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


TOUCHED = """
import os, sys, torch
calls = []
def touched(*_):
    calls.append(sys._getframe(1).f_code.co_filename)
    return 4
torch.cuda._is_compiled = lambda: True
torch.cuda._lazy_init = touched
torch.cuda._device_count_nvml = lambda: 4
for name in ("_cuda_getDeviceCount", "_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_setDevice",
             "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
    setattr(torch._C, name, touched)
import helpers.imported
assert torch.cuda.is_available() and torch.cuda.device_count() == 4
assert not calls, calls
print("untouched")
"""


@pytest.mark.slow
def test_the_server_s_imports_touch_no_gpu():
    """With four GPUs that NVML would report: nothing asks the CUDA runtime, which would make forking impossible."""
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, **servers.GPU_ENVIRONMENT, "PYTHONPATH": path}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    found = subprocess.run([sys.executable, "-c", TOUCHED], env=environment, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1:] == ["untouched"], found.stderr[-3000:]
