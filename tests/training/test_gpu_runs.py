"""Whole runs through the command line on one GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, PATHS))}
MODEL = "--num-layers 3 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --vocab-multiple 192".split()
RUN = "--global-batch-size 8 --micro-batch-size 4 --eval-samples 8 --log-interval 1 --warmup-steps 2".split()
SLOPE = "--slope-adapter-rank 16 --slope-lazy-fraction 0.25 --slope-backward-mask-interval 3".split()


def slope(*arguments, code=0):
    """A `slope` command in a process of its own: what it said on standard output and on standard error."""
    command = [sys.executable, "-m", "slope_megatron", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def answers(folder, prompts: list[str], tokens: int, **how) -> list[list[int]]:
    """The tokens that a run or a packed export answers with, all prompts in one batch; `how`: of `open_decoder`."""
    from slope_megatron.evaluation.models import open_decoder
    from slope_megatron.inference.generate import Sampling, generate

    decoder, text = open_decoder(folder, **how)
    found: list[list[int]] = [[] for _ in prompts]
    encoded = [text.encode(prompt) for prompt in prompts]
    for row, token in generate(decoder, encoded, Sampling(tokens, temperature=0.0), text.eod):
        found[row].append(token)
    return found


@torch.no_grad()
def shortfall(model, prompts: list[list[int]], found: list[list[int]]) -> float:
    """By how much, at most, the logit of an answer's token is below the largest one of `model`, of transformers."""
    worst = 0.0
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        worst = max([worst, *(logits.amax(1) - chosen).tolist()])
    return worst


def files_of(checkpoint):
    """Name -> checksum of everything that a checkpoint holds of the model and the optimizer."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return {name: entry["xxh3_128"] for name, entry in manifest.items() if name.endswith(".distcp")}


@pytest.mark.parametrize(
    "layout",
    [[], ["--zero-stage", "3"], ["--dtype", "fp16", "--initial-loss-scale", "1024"], ["--slope-mode", "full"]],
)
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
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["device"] == torch.cuda.get_device_name() and summary["peak_memory_bytes"] > 0
    assert 0 < summary["speed"]["mfu_actual"] < summary["speed"]["mfu"] < 1
    last = "checkpoints/step_00000012"
    assert files_of(again / last) == files_of(whole / last)


def test_a_full_gpu_ends_the_run_with_one_sentence(corpus, tmp_path):
    """A micro-batch of half a million tokens in a model of width 8192."""
    model = "--num-layers 4 --hidden-size 8192 --num-attention-heads 64 --seq-length 256 --vocab-multiple 192".split()
    # Dense: no kernels are chosen for a size that does not fit.
    batch = ["--micro-batch-size", 2048, "--global-batch-size", 2048, "--eval-samples", 1, "--slope-method", "dense"]
    batch += ["--save-interval", 0]  # Its checkpoints would want some 84 GB of disk.
    _, said = slope("pretrain", "--data", corpus, "--out", tmp_path / "run", *model, *batch, code=71)
    errors = [line for line in said.splitlines() if line.startswith("slope: error: ")]
    assert len(errors) == 1 and "Traceback" not in said
    assert errors[0].startswith("slope: error: rank 0 ran out of GPU memory in step 1 (")
    assert "take a --micro-batch-size under 2048, --recompute full" in errors[0]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run in fp16, whose logits have fewer ties than bf16's; adapters have joined."""
    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = [*MODEL, *RUN, *SLOPE, "--steps", 80, "--dtype", "fp16", "--zero-stage", 2, "--lr", "2e-3"]
    slope("pretrain", "--data", corpus, "--out", run, *arguments)
    return run


PROMPTS = ["def ", "import os", "class Error(Exception):", "    return self"]


# fp16 logits of some 10 have steps of 2^-7; a fault moves them by far more.
NEAR_TIE = 0.05


def test_generation_is_the_reference_s_and_the_exported_model_s(trained, tmp_path):
    """Prefill, then one token at a time, on 2:4 tensor cores and dense: greedy by the model that was exported."""
    from transformers import AutoModelForCausalLM

    from slope_megatron.cli import main
    from slope_megatron.data.tokenizer import load_tokenizer

    exported, packed = tmp_path / "exported", tmp_path / "packed"
    for kind, folder in (("hf", exported), ("packed", packed)):
        assert main(["export", kind, str(trained), str(folder)]) == 0
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float16).cuda().eval()
    tokenizer = load_tokenizer(exported)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    for folder, backend in ((trained, "cusparselt"), (trained, "reference"), (packed, "cusparselt")):
        found = answers(folder, PROMPTS, 40, backend=backend)
        assert max(map(len, found)) > 20, "short answers say little"
        assert shortfall(model, prompts, found) < NEAR_TIE, backend
