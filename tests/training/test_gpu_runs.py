"""Whole runs through the command line on one GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, PATHS))}
MODEL = "--num-layers 3 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --vocab-multiple 192".split()
RUN = "--global-batch-size 8 --micro-batch-size 4 --eval-samples 8 --log-interval 1 --warmup-steps 2".split()
SLOPE = "--slope-adapter-rank 16 --slope-lazy-fraction 0.25 --slope-backward-mask-interval 3".split()


def slope(*arguments):
    """A `slope` command in a process of its own; its standard output."""
    command = [sys.executable, "-m", "slope_megatron", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def files_of(checkpoint):
    """Name -> checksum of everything that a checkpoint holds of the model and the optimizer."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".distcp")}


@pytest.mark.parametrize("layout", [[], ["--zero-stage", "3"], ["--dtype", "fp16", "--initial-loss-scale", "1024"]])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(corpus, tmp_path, layout):
    """Losses and the last checkpoint's weights, masters and moments; kernel choices are taken over, not measured."""
    common = ["pretrain", "--data", corpus, *MODEL, *RUN, *SLOPE, "--steps", 12, "--save-interval", 6, *layout]
    whole, again = tmp_path / "whole", tmp_path / "again"
    slope(*common, "--deterministic", "--out", whole)
    shutil.copytree(whole, again)
    for name in ("DONE", "summary.json", "metrics.jsonl", "checkpoints/latest"):
        (again / name).unlink()
    shutil.rmtree(again / "checkpoints" / "step_00000012")
    choices = again / "kernel_choices_stage_0.json"
    before = choices.read_text()
    _, said = slope(*common, "--deterministic", "--out", again, "--resume")
    assert "deterministic: fixed order" in said
    assert choices.read_text() == before
    expected = {step: loss for step, loss in losses(whole).items() if step > 6}
    assert losses(again) == expected and len(expected) == 6
    last = "checkpoints/step_00000012"
    assert files_of(again / last) == files_of(whole / last)
