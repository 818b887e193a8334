"""Whole runs through the command line: one process here; four ranks under the deepspeed launcher in the slow tier."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import commands
from slope_megatron.cli import main
from slope_megatron.launch.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-multiple 48".split()
# Of a busy machine; a collective whose peer is gone would wait for half an hour.
PATIENCE = 600
RUN = "--global-batch-size 8 --micro-batch-size 2 --steps 8 --eval-samples 8 --eval-interval 4 --warmup-steps 2".split()
SLOPE = "--slope-adapter-rank 4 --slope-lazy-fraction 0.25 --slope-backward-mask-interval 3".split()


def slope(*arguments):
    """`slope pretrain` in a process of its own."""
    return commands.slope("pretrain", *arguments)


def launched(ranks, *arguments):
    """The command that starts `slope pretrain` on several ranks."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--no_local_rank", "--master_port", "0"]
    port = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [sys.executable, *launcher[:-2], *port, "--module", "slope_megatron", "pretrain", *map(str, arguments)]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


def test_a_run_stops_resumes_exactly_and_sums_up(corpus, tmp_path):
    common = ["--data", corpus, *MODEL, *RUN, *SLOPE, "--log-interval", 1, "--save-interval", 5]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = slope(*common, "--out", whole)
    assert done.returncode == 0, done.stderr
    assert slope(*common, "--out", parted, "--stop-at", 5).returncode == 0
    assert slope(*common, "--out", parted, "--resume").returncode == 0
    assert losses(parted) == losses(whole)
    assert list(losses(whole)) == list(range(1, 9))

    lines = metrics(whole)
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 6, 8], "every 4 steps, and as adapters join"
    assert [line["adapters"] for line in lines if "loss" in line] == [False] * 6 + [True] * 2
    summary = json.loads((whole / "summary.json").read_text())
    again = json.loads((parted / "summary.json").read_text())
    assert summary["val_loss"] == again["val_loss"] < math.log(528)
    assert summary["double_pruning"]["formula"] == 0.09375
    assert summary["double_pruning"]["measured"] == pytest.approx(0.09375, abs=0.01)
    assert summary["device"] == "cpu" and summary["peak_memory_bytes"] is None
    assert summary["speed"]["model_tflops"] > summary["speed"]["actual_tflops"] > 0
    sizes = summary["state_bytes"]["sparse_layers"]
    # 2 blocks x (4 + 4 + ... ) h^2: qkv 3, proj 1, fc1 4, fc2 4 of 64 x 64, without the first qkv; half of them kept.
    kept = (2 * 12 - 3) * 64 * 64 // 2
    assert sizes["weights"] == sizes["gradients"] == 4 * kept
    assert sizes["optimizer"] == 12 * kept
    assert sizes["patterns"] == 2 * kept // 8 + kept // 8
    assert json.loads((whole / "run.json").read_text())["origins"]["slope.adapter_rank"] == "flag"


def test_off_a_terminal_the_log_is_lines_that_people_read(corpus, tmp_path):
    """A table, then a line each of steps, validations and saves; no bar, and nothing of the libraries' imports."""
    run = tmp_path / "run"
    common = ["--data", corpus, "--out", run, *MODEL, *RUN, "--log-interval", 3, "--brief"]
    assert slope(*common, "--stop-at", 5).returncode == 0
    wall_before = metrics(run)[-2]["wall_seconds"]
    done = slope(*common, "--resume")
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert "\r" not in done.stderr and "Warning" not in done.stderr
    steps = [line for line in said if line.startswith("step ") and " | " in line]
    assert [line.split(" | ")[0] for line in steps] == ["step 6/8", "step 8/8"]
    assert all(line.endswith("tokens/s | skipped 0") and "loss " in line and "lr " in line for line in steps)
    assert any(line.startswith("step 8: validation loss ") for line in said)
    assert "checkpoint step_00000008 is saved" in said
    assert any(line.startswith("layout      TP 1 x PP 1 x DP 1 = 1") for line in said)
    assert any(line.startswith("tokens      2,048 in 8 steps: ") for line in said)
    last = [line for line in metrics(run) if "loss" in line][-1]
    assert last["consumed_tokens"] == 8 * 8 * 32
    tokens = json.loads((corpus / "manifest.json").read_text())["splits"]["train"]["tokens"]
    assert last["epoch"] == last["consumed_tokens"] / tokens
    assert last["wall_seconds"] > wall_before > 0, "times add up over attempts"


def test_limits_that_are_reached_are_said(corpus, tmp_path):
    wide = ["--slope-adapter-rank", 65, "--slope-lazy-fraction", 0.5, "--steps", 1, "--save-interval", 0, "--brief"]
    done = slope("--data", corpus, "--out", tmp_path / "run", *MODEL, *RUN, *wide, "--eval-samples", 10_000)
    assert done.returncode == 0, done.stderr
    assert "--slope-adapter-rank is 65 and --hidden-size 64: adapters of a rank above the width" in done.stderr
    tokens = json.loads((corpus / "manifest.json").read_text())["splits"]["valid"]["tokens"]
    assert f"--eval-samples is 10000 and the valid split has {(tokens - 1) // 32} samples of 32 tokens" in done.stderr


BAD = [
    (["--hidden-size", 72], "--hidden-size is 72"),
    (["--slope-nm", "5:4"], "--slope-nm is '5:4'"),
    (["--tensor-parallel", 2], "1 rank was started with --tensor-parallel 2 and"),
    (["--global-batch-size", 7], "--global-batch-size is 7: it must be a multiple"),
    (["--architecture", "bert"], "was prepared with --kind gpt and --architecture is bert: prepare the text with"),
    (["--init-from", "nowhere"], "nowhere is no folder: give a run folder, a folder that `slope import hf` wrote"),
    (["--data", "nowhere"], "data folder nowhere does not exist"),
    (["--seq-length", 10**7], "one sample of --seq-length 10000000 needs"),
    (["--resume"], "holds no run to resume"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_sentence_and_writes_nothing(corpus, tmp_path, flags, message):
    out = tmp_path / "run"
    result = slope("--data", corpus, "--out", out, *MODEL, *RUN, *flags)
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1 and message in said[0]
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_a_vocabulary_that_is_too_small_is_refused_before_anything_is_written(corpus, tmp_path, capsys):
    assert main(["pretrain", "--data", str(corpus), "--out", str(tmp_path / "run"), "--vocab-size", "100"]) == 2
    assert "--vocab-size is 100 and the data's tokenizer has" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_run_is_refused(corpus, tmp_path):
    out = tmp_path / "run"
    common = ["--data", corpus, "--out", out, *MODEL, *RUN]
    assert slope(*common, "--stop-at", 1).returncode == 0
    before = sorted(path.name for path in out.iterdir())
    again = slope(*common)
    assert (
        again.returncode == 2 and "give --resume to go on, --overwrite to delete it, or another --out" in again.stderr
    )
    other = slope(*common, "--resume", "--num-layers", 3)
    assert other.returncode == 2 and "model.num_layers: 2 then, 3 now" in other.stderr
    assert sorted(path.name for path in out.iterdir()) == before
    assert slope(*common, "--overwrite", "--stop-at", 1).returncode == 0
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("do not lose me")
    in_a_file = slope(*common[:2], "--out", stranger / "thesis.tex" / "run", *MODEL, *RUN)
    assert in_a_file.returncode == 2 and f"{stranger}/thesis.tex is a file; give the path" in in_a_file.stderr
    refused = slope(*common[:2], "--out", stranger, *MODEL, *RUN, "--overwrite")
    assert refused.returncode == 2 and "holds no run of this program" in refused.stderr
    assert (stranger / "thesis.tex").read_text() == "do not lose me"


@pytest.mark.slow
def test_a_dense_run_goes_on_sparse(corpus, tmp_path):
    """Prune on load: the sparse run starts from the dense one's weights, not from fresh ones."""
    common = ["--data", corpus, *MODEL, *RUN, "--log-interval", 1]
    dense, sparse, fresh = tmp_path / "dense", tmp_path / "sparse", tmp_path / "fresh"
    assert slope(*common, "--out", dense, "--no-slope", "--lr", "1e-2").returncode == 0
    checkpoint = dense / "checkpoints" / "step_00000008"
    magnitude = ["--slope-pattern", "magnitude", "--stop-at", 1]
    begun = slope(*common, *magnitude, "--out", sparse, "--init-from", checkpoint)
    assert begun.returncode == 0, begun.stderr
    assert slope(*common, *magnitude, "--out", fresh).returncode == 0
    assert losses(sparse)[1] < losses(fresh)[1] - 0.1
    again = slope(*common, *magnitude, "--out", tmp_path / "again", "--init-from", sparse)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again")[1] < losses(fresh)[1] - 0.1
    packed = slope(*common, "--out", tmp_path / "x", "--init-from", sparse, "--no-slope")
    assert packed.returncode == 2 and "holds a packed model and this run's first weights are dense" in packed.stderr


@pytest.mark.slow
def test_a_signal_saves_and_auto_resume_goes_on(corpus, tmp_path):
    common = ["--data", corpus, *MODEL, *RUN, *SLOPE, "--log-interval", 1, "--save-interval", 100]
    common[common.index("--steps") + 1] = "60"
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert slope(*common, "--out", whole).returncode == 0
    assert (whole / "DONE").read_text() == "60 steps\n"
    command = [sys.executable, "-m", "slope_megatron", "pretrain", *map(str, common), "--out", parted, "--auto-resume"]
    for signal_number in (signal.SIGUSR1, signal.SIGTERM):
        seen = max([0, *losses(parted)]) if parted.exists() else 0
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        wait_for_step(parted, seen + 3, rank=0)
        process.send_signal(signal_number)
        said = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 75, said
        assert f"rank 0 got {signal_number.name}: saving after this step" in said
        assert not (parted / "DONE").exists()
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=PATIENCE).returncode == 0
    assert (parted / "DONE").exists()
    assert losses(parted) == losses(whole)


def test_one_folder_has_one_writer(tmp_path):
    from slope_megatron.training.checkpoint.run_folder import RunLock

    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=rf"is being written by process {os.getpid()} on .*: wait for it to end"):
        RunLock(tmp_path)
    del lock
    RunLock(tmp_path)


@pytest.mark.slow
def test_a_dead_rank_is_named_and_the_run_resumes(corpus, tmp_path):
    """Four ranks under the deepspeed launcher; rank 2 is killed in mid-run."""
    common = ["--data", corpus, *MODEL, *RUN, *SLOPE, "--tensor-parallel", 2, "--log-interval", 1, "--save-interval", 2]
    common[common.index("--steps") + 1] = "40"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = {"env": ENVIRONMENT, "check": True, "capture_output": True, "timeout": PATIENCE}
    subprocess.run(launched(4, *common, "--out", whole), **run)

    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(launched(4, *common, "--out", killed), env=ENVIRONMENT, stdout=stderr, stderr=stderr)
        victim = wait_for_step(killed, 5)
        os.kill(victim["pid"], signal.SIGKILL)
        assert process.wait(PATIENCE) != 0
    said = (tmp_path / "stderr").read_text()
    assert f"rank 2 (process {victim['pid']}" in said and "died; the run stops" in said
    assert "is complete: the same command with --resume goes on from it" in said

    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import store

    assert sums.find_damage(store.newest(killed)) is None
    resume = launched(4, *common, "--out", killed, "--resume")
    subprocess.run(resume, **run)
    assert losses(killed) == losses(whole)


def wait_for_step(run, step, rank=2):
    """The announcement of one rank, once the run has logged `step`."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and max([0, *losses(run)]) >= step:
            return json.loads((run / "ranks" / f"rank_{rank}.json").read_text())
        time.sleep(0.05)
    raise AssertionError(f"the run did not reach step {step}")


@pytest.mark.slow
def test_a_dense_run_is_pruned_evaluated_and_trained_on(corpus, tmp_path):
    common = ["--data", corpus, *MODEL, *RUN, "--log-interval", 1]
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    assert slope(*common, "--out", dense, "--no-slope", "--lr", "1e-2").returncode == 0
    wanda = ["--slope-pattern", "wanda", "--slope-wanda-samples", 16, "--out", pruned]
    wanda += ["--init-from", dense / "checkpoints" / "step_00000008"]
    done = slope(*common, *wanda, "--stop-at", 0)
    assert done.returncode == 0, done.stderr
    summary = json.loads((pruned / "summary.json").read_text())
    trained = json.loads((dense / "summary.json").read_text())
    assert summary["steps"] == 0 and summary["tokens"] == 0
    # Half the weights are gone: another model, which still knows what the dense one has learnt since loss 6.27.
    assert summary["val_loss"] != trained["val_loss"] < 5.6
    assert summary["val_loss"] == pytest.approx(trained["val_loss"], abs=0.3)
    resumed = slope(*common, *wanda, "--resume", "--stop-at", 1)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((pruned / "summary.json").read_text())["steps"] == 1
