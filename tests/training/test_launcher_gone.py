"""No rank trains on as an orphan: a launcher that goes is missed, and the run is saved before its ranks end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from slope_megatron.launch.ports import free_port
from slope_megatron.training.watch import launcher, process

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-multiple 192".split()
STEPS = "--steps 100000 --global-batch-size 4 --micro-batch-size 2 --eval-samples 4 --eval-interval 100000".split()
STEPS += "--warmup-steps 2 --log-interval 1 --save-interval 100000".split()
SHOW = "from slope_megatron.training.watch.launcher import found_above; print(found_above('RANK'))"
PATIENCE = 300.0


def environment(**more) -> dict[str, str]:
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    rest = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**rest, **own, **more}


def chain(tmp_path, *programs: str, rank_from: int) -> list[str]:
    """Names of the launchers that a rank finds under these programs, the outermost first, each starting the next.

    Args:
        rank_from: the number of those that start before the rank's number is set.
    """
    command = [sys.executable, "-c", SHOW]
    for level in range(len(programs), -1, -1):
        if level == rank_from:
            command = ["env", "RANK=3", *command]
        if level and programs[level - 1] == "sh":
            command = ["sh", "-c", f"{shlex.join(command)}; true"]
        elif level:
            script = tmp_path / programs[level - 1]
            script.write_text("import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)")
            command = [sys.executable, str(script), *command]
    shown = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
    return [name for _, name in eval(shown)]


@pytest.mark.parametrize(
    ("programs", "rank_from", "found"),
    [
        (["torchrun"], 1, ["torchrun"]),
        (["mpirun", "deepspeed"], 2, ["deepspeed", "mpirun"]),
        (["sh", "torchrun"], 2, ["torchrun"]),
        (["torchrun", "sh"], 1, ["torchrun"]),  # a script around the rank
        (["torchrun", "sh"], 2, []),  # the shell has set the number itself
        (["torchrun", "own_launcher.py"], 2, ["own_launcher.py", "torchrun"]),
        (["submit.py", "torchrun"], 2, ["torchrun"]),
    ],
)
def test_launchers_are_told_from_shells_and_wrappers(programs, rank_from, found, tmp_path):
    assert chain(tmp_path, *programs, rank_from=rank_from)[: len(found) or None] == found


def test_a_process_without_a_launcher_misses_none():
    assert launcher.Launcher("").gone() is None
    assert launcher.Launcher("").processes == {}


def test_a_launcher_that_ends_is_named():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watched = launcher.Launcher("")
    watched.processes = {child.pid: (process.born(child.pid), "torchrun")}
    assert watched.gone() is None
    child.kill()
    deadline = time.monotonic() + PATIENCE
    while watched.gone() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watched.gone() == f"torchrun, process {child.pid}", "dead, and not even collected yet"
    child.wait()


def start(name: str, log, corpus, run):
    program = ["slope_megatron", "pretrain", "--brief", "--data", str(corpus), "--out", str(run), *MODEL, *STEPS]
    port = ["--master_port", str(free_port())]
    if name == "torchrun":
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *port, "-m", *program]
    else:
        command = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank"]
        command += ["--master_addr", "127.0.0.1", *port, "--module", *program]
    with open(log, "w") as stream:
        return subprocess.Popen([sys.executable, *command], stdout=stream, stderr=stream, env=environment())


def await_steps(run, log, count: int) -> None:
    path, deadline = run / "metrics.jsonl", time.monotonic() + PATIENCE
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("torchrun", signal.SIGUSR1),
        ("torchrun", signal.SIGKILL),
        ("torchrun", signal.SIGHUP),
        ("deepspeed", signal.SIGUSR1),
    ],
)
def test_ranks_save_and_end_when_their_launcher_goes(name, number, corpus, tmp_path):
    from slope_megatron.training.checkpoint import store

    run, log = tmp_path / "run", tmp_path / "log"
    child = start(name, log, corpus, run)
    ranks: list = []
    try:
        await_steps(run, log, 3)
        announced = [json.loads((run / "ranks" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
        ranks = [(beat["pid"], process.born(beat["pid"])) for beat in announced]
        child.send_signal(number)
        child.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while any(process.born(pid) == start for pid, start in ranks):
            assert time.monotonic() < deadline, f"ranks train on: {log.read_text()}"
            time.sleep(0.05)
    finally:
        child.kill()
        for pid, began in ranks:
            if process.born(pid) == began:
                os.kill(pid, signal.SIGKILL)
    said = log.read_text()
    if number != signal.SIGHUP:  # which torchrun passes on
        assert "has lost its launcher (" in said and "saving after this step" in said
    [saved] = store.complete_checkpoints(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped_early"] and saved.name == f"step_{summary['steps']:08d}" and not summary["unsaved"]


@pytest.mark.slow
def test_a_launcher_that_goes_before_training_leaves_nothing_waiting(corpus, tmp_path):
    """A rank whose peers never come, killed launcher: it would wait for half an hour."""
    code = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()"
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = tmp_path / "launch.py"
    script.write_text(code.replace("sys.argv[1:]", f"sys.argv[1:], env={environment(**ranks)!r}"))
    rank = [sys.executable, "-m", "slope_megatron", "pretrain", "--data", str(corpus), "--out", str(tmp_path / "run")]
    with open(tmp_path / "log", "w") as stream:
        command = [sys.executable, str(script), *rank, *MODEL, *STEPS]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True)
        pid = int(child.stdout.readline())
        began = process.born(pid)
        time.sleep(3.0)
        assert process.born(pid) == began, (tmp_path / "log").read_text()
        child.kill()
        child.wait()
    deadline = time.monotonic() + PATIENCE
    while process.born(pid) == began:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (
        f"slope: the launcher (launch.py, process {child.pid}) is gone: ended before training"
        in (tmp_path / "log").read_text()
    )
