"""`--save-interval 0`: trials that train, measure and leave no checkpoint."""

import json
import signal
import subprocess
import sys

import pytest
from test_pretrain import ENVIRONMENT, MODEL, RUN, losses, wait_for_step

from helpers import commands
from slope_megatron.config import TrainConfig

FLAGS = [*MODEL, *RUN, "--log-interval", "1"]


def no_room(*_):
    raise AssertionError("the free space was asked for")


def forbid_disk_usage():
    import shutil

    shutil.disk_usage = no_room


def test_nothing_but_metrics_and_summary_is_written(corpus, tmp_path):
    run = tmp_path / "run"
    done = commands.slope(
        "pretrain", "--data", corpus, *FLAGS, "--out", run, "--save-interval", 0, before=forbid_disk_usage
    )
    assert done.returncode == 0, done.stderr
    assert "no checkpoint is written (--save-interval is 0)" in done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["unsaved"]) == (8, "--save-interval is 0")
    assert summary["val_loss"] is not None and (run / "DONE").is_file()
    assert list(losses(run)) == list(range(1, 9))
    assert not (run / "checkpoints").exists() or not list((run / "checkpoints").iterdir())
    again = commands.slope("pretrain", "--data", corpus, *FLAGS, "--out", run, "--resume")
    assert again.returncode == 2
    assert f"{run} has no complete checkpoint to resume from: start anew with --overwrite" in again.stderr


def test_a_trial_goes_on_from_a_saved_run_and_leaves_it_as_it_is(corpus, tmp_path):
    run = tmp_path / "run"
    common = ["pretrain", "--data", corpus, *FLAGS, "--out", run]
    assert commands.slope(*common, "--stop-at", 2).returncode == 0
    trial = commands.slope(*common, "--resume", "--save-interval", 0, "--stop-at", 4)
    assert trial.returncode == 0, trial.stderr
    tried = losses(run)
    assert list(tried) == [1, 2, 3, 4] and not (run / "DONE").exists()
    assert [path.name for path in sorted((run / "checkpoints").glob("step_*"))] == ["step_00000002"]
    assert commands.slope(*common, "--resume").returncode == 0
    assert {step: losses(run)[step] for step in tried} == tried and (run / "DONE").is_file()


@pytest.mark.slow
def test_a_signal_ends_it_and_says_that_nothing_is_saved(corpus, tmp_path):
    run = tmp_path / "run"
    flags = [*FLAGS, "--save-interval", "0", "--steps", "10000", "--out", str(run)]
    command = [sys.executable, "-m", "slope_megatron", "pretrain", "--data", str(corpus), *flags]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 2, rank=0)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 143, said
    assert "rank 0 got SIGUSR1: ending after this step, unsaved (--save-interval is 0)" in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped_early"] and summary["unsaved"] == "--save-interval is 0"
    assert not (run / "DONE").exists()


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match="--save-interval is -1: it must be at least 1, or 0 to save nothing"):
        TrainConfig(save_interval=-1)
