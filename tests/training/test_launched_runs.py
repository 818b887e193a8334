"""`slope pretrain` under every launcher; a rank killed, and the run resumed by fewer replicas.

Over gloo on two CPU ranks, and over NCCL on two or four GPUs.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slope_megatron.launch.ports import free_port
from slope_megatron.training.parallel import SHARE_GPUS

ROOT = Path(__file__).resolve().parents[2]
MODEL = "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 64 --vocab-multiple 192".split()
STEPS = "--global-batch-size 8 --micro-batch-size 2 --eval-samples 8 --warmup-steps 2 --log-interval 1".split()
SLOPE = "--slope-adapter-rank 16 --slope-lazy-fraction 0.5 --slope-backward-mask-interval 3".split()
PATIENCE = 300.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a run's ranks are: how many, and over how many the model is cut; whether torch.compile fuses there."""

    device: str
    world: int
    tensor_parallel: int
    compiles: bool = False

    def environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        # Containers run tests as root, which Open MPI refuses unless told twice.
        own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        own |= {"TORCHDYNAMO_DISABLE": "0" if self.compiles else "1"}
        if self.device == "cpu":
            own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def command(self, launcher: str, ranks: int, *arguments) -> list[str]:
        """Starts `slope pretrain` on `ranks` ranks."""
        program = ["slope_megatron", "pretrain", "--brief", *map(str, arguments)]
        port = str(free_port())
        if launcher == "torchrun":
            where = ["--nproc-per-node", str(ranks), "--master-port", port]
            return [sys.executable, "-m", "torch.distributed.run", *where, "-m", *program]
        if launcher == "deepspeed":
            where = ["--num_gpus", str(ranks), "--no_local_rank", "--master_addr", "127.0.0.1", "--master_port", port]
            return [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--module", *program]
        where = ["-np", str(ranks), "--oversubscribe", "--bind-to", "none", "-x", "MASTER_ADDR", "-x", "MASTER_PORT"]
        return ["mpirun", *where, "-x", "PATH", "-x", "PYTHONPATH", sys.executable, "-m", *program]

    def start(self, launcher: str, ranks: int, log: Path, *arguments) -> subprocess.Popen:
        with open(log, "w") as stream:
            command = self.command(launcher, ranks, *arguments)
            return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=self.environment())

    def run(self, launcher: str, ranks: int, log: Path, *arguments) -> None:
        process = self.start(launcher, ranks, log, *arguments)
        try:
            assert process.wait(PATIENCE) == 0, log.read_text()
        finally:
            process.kill()


@pytest.fixture(params=[pytest.param("gloo", marks=pytest.mark.slow), pytest.param("nccl", marks=pytest.mark.gpu)])
def machine(request) -> Machine:
    if request.param == "gloo":
        return Machine("cpu", 2, 1)
    import torch

    found = torch.cuda.device_count()
    if found < 2 and not (found and os.environ.get(SHARE_GPUS) == "1"):
        pytest.skip(f"2 ranks over NCCL need 2 GPUs, and this machine has {found}")
    return Machine("cuda", 4, 2) if found >= 4 else Machine("cuda", 2, 1)


def settings(machine: Machine, corpus, run: Path, *more) -> list:
    layout = ["--tensor-parallel", machine.tensor_parallel]
    if machine.tensor_parallel > 1:
        layout.append("--sequence-parallel")
    return ["--data", corpus, "--out", run, *MODEL, *STEPS, *SLOPE, *layout, *more]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


BY_TORCHRUN: dict = {}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpirun"])
def test_every_launcher_ends_in_the_same_run(machine, corpus, tmp_path, launcher):
    if shutil.which(launcher if launcher == "mpirun" else sys.executable) is None:
        pytest.skip("mpirun is not installed here")
    run = tmp_path / "run"
    # On GPUs; once is enough: it takes each rank longer than the steps.
    machine = dataclasses.replace(machine, compiles=launcher == "torchrun" and machine.device == "cuda")
    machine.run(launcher, machine.world, tmp_path / "log", *settings(machine, corpus, run, "--steps", 6))
    summary = json.loads((run / "summary.json").read_text())
    assert (run / "DONE").is_file() and summary["ranks"] == machine.world
    assert summary["tensor_parallel"] == machine.tensor_parallel
    assert summary["backend"] == ("reference" if machine.device == "cpu" else "cusparselt")
    found = losses(run)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    # bf16 on GPUs, where kernels chosen by their time may differ from one start to the next.
    bound = 1e-2 if machine.device == "cuda" else 0.0
    assert found == pytest.approx(BY_TORCHRUN.setdefault(machine.device, found), rel=bound, abs=0.0)


def test_a_killed_rank_is_named_and_fewer_replicas_go_on(machine, corpus, tmp_path):
    """Killed after a checkpoint; half the replicas resume, and their losses are those that the killed run had noted."""
    run, saved = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000010" / "manifest.json"
    common = settings(machine, corpus, run, "--steps", 100_000, "--save-interval", 10)
    process = machine.start("torchrun", machine.world, tmp_path / "log", *common)
    try:
        wait_until(saved.is_file, process, tmp_path / "log")
        wait_until(lambda: max(losses(run), default=0) >= 13, process, tmp_path / "log")
        victim = json.loads((run / "ranks" / f"rank_{machine.world - 1}.json").read_text())["pid"]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(PATIENCE) != 0
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    assert f"rank {machine.world - 1} (process {victim} on" in said and "died; the run stops" in said, said
    assert "is complete: the same command with --resume goes on from it" in said
    noted = losses(run)
    newest = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    last = newest + 5
    machine.run(
        "torchrun", machine.world // 2, tmp_path / "log2", *common, "--resume", "--stop-at", last, "--no-async-save"
    )
    resumed = losses(run)
    assert max(resumed) == last
    both = [step for step in resumed if step > newest and step in noted]
    # Another order of sums; on GPUs, bf16.
    bound = 1e-2 if machine.device == "cuda" else 1e-4
    assert [resumed[step] for step in both] == pytest.approx([noted[step] for step in both], rel=bound)
    assert all(resumed[step] == noted[step] for step in range(1, newest + 1)), "what was before stays"


def wait_until(condition, process: subprocess.Popen, log: Path) -> None:
    begun = time.monotonic()
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - begun < PATIENCE, f"nothing after {PATIENCE} s:\n{log.read_text()}"
        time.sleep(0.02)
