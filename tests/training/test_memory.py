"""Memory that is too little: said before the adapters join, saved first, and one sentence when the device is full."""

import dataclasses
import subprocess
import sys

import pytest
from test_pretrain import ENVIRONMENT, MODEL, RUN, SLOPE

from helpers.models import build_engine, small_config
from slope_megatron.training.telemetry import memory
from slope_megatron.training.telemetry.memory import GIB, Memory

ROOMY = Memory(allocated=3 * GIB, peak=5 * GIB, reserved=6 * GIB, free=2 * GIB, total=8 * GIB)
TIGHT = Memory(allocated=3 * GIB, peak=6 * GIB, reserved=6 * GIB, free=0, total=8 * GIB)


def test_the_report_weighs_need_against_room():
    need = {"gradients": GIB, "activations": 2 * GIB}
    said, fits = memory.adapters_report(need, ROOMY)
    assert fits
    assert said == (
        "adapters join: 3.00 GiB taken now, 5.00 GiB at the highest so far, of 8.00 GiB; they add 1.00 GiB of "
        "gradients and 2.00 GiB of activations; 3.00 GiB are left for them"
    )
    said, fits = memory.adapters_report(need, TIGHT)
    assert not fits and said.endswith("0.00 MiB are left for them, which is not enough")
    said, fits = memory.adapters_report(need, None)
    assert fits and said.startswith("adapters join: they add 1.00 GiB of gradients")


def test_a_full_device_gets_one_sentence_with_ways_out():
    said = memory.explain(small_config(), 3, "in step 7", TIGHT)
    assert said == (
        "rank 3 ran out of GPU memory in step 7 (6.00 GiB at the highest of 8.00 GiB, 2.00 GiB by others): take a "
        "--micro-batch-size under 2, --recompute full, a --zero-stage above 1, with several replicas, "
        "--offload-optimizer cpu, a --tensor-parallel above 1"
    )
    assert "--recompute" not in memory.explain(small_config(recompute="full"), 0, "building the model", None)


def need_of(config, dtype):
    """What the adapters were predicted to add, and the gradient bytes measured before and after they joined."""
    import torch

    from helpers.models import step_batches

    engine = build_engine(config, dtype)
    need, measured = memory.adapters_need(engine), []
    for step in range(config.adapter_start + 1):
        engine.held_gradients = None
        engine.train_step(step_batches(config, step, 0, 1))
        measured.append(engine.held_gradients.bytes)
    assert isinstance(engine.model.decoder.layers[1].mlp.linear_fc1.adapter_l, torch.nn.Parameter)
    return need, measured


def test_the_adapters_need_is_what_they_take(ranks):
    """fp32 at stage 1: gradients exist once a loss has used them, so the difference can be measured."""
    import torch

    config = small_config(slope={"adapter_rank": 4, "lazy_fraction": 0.5}, steps=4)
    need, measured = ranks.run(need_of, config, torch.float32, world=1)[0]
    widest = 4 * 4 * (64 + 256)
    assert need["gradients"] - widest == measured[-1] - measured[0] > 0
    # 7 sparse linears (the first one stays dense), 2 samples of 16 tokens, rank 4, fp32.
    assert need["activations"] == 7 * 2 * 16 * 4 * 4


def float8_need(config):
    import torch

    return memory.adapters_need(build_engine(config, torch.bfloat16))["activations"]


@pytest.mark.parametrize("wgrad", [True, False])
def test_with_adapters_an_e4m3_layer_keeps_its_input_in_16_bits(ranks, wgrad):
    slope = {"adapter_rank": 4, "lazy_fraction": 0.5, "fp8": "current", "fp8_wgrad": wgrad}
    config = small_config(slope=slope, steps=4)
    need = ranks.run(float8_need, config, world=1)[0]
    # Of 7 sparse linears all but two fc2, of 256, have 64 inputs; one byte of two was kept of each.
    inputs = 5 * 64 + 2 * 256
    assert need == 2 * 16 * (7 * 4 * 2 + (inputs if wgrad else 0))


FULL_DEVICE = """
import sys, torch
from slope_megatron.integrations import cpu_host
cpu_host.prepare()
from slope_megatron.training import engine
from slope_megatron.training.telemetry import memory
memory.measure = lambda device: memory.Memory(allocated=1 << 20, peak=1 << 30, reserved=1 << 30, free=0, total=1 << 30)
step = engine.Engine.train_step
def train_step(self, batches):
    if self.steps_done == 7:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return step(self, batches)
engine.Engine.train_step = train_step
from slope_megatron.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_saves_before_a_tight_switch_and_ends_with_the_sentence(corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ["pretrain", "--data", corpus, "--out", run, *MODEL, *RUN, *SLOPE]
    command = [sys.executable, "-c", FULL_DEVICE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 71, done.stderr
    assert "which is not enough" in done.stderr and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1
    assert said[0].startswith("slope: error: rank 0 ran out of GPU memory in step 8 (1.00 GiB at the highest of 1.00")
    # The adapters join at step 6 of 8.
    assert said[0].endswith(
        f"Checkpoint {run}/checkpoints/step_00000006 is complete: the same command with --resume goes on from it."
    )


def needs_of(config):
    """What is said of the other form in each form, of engines that have trained one step."""
    from helpers.models import step_batches

    found = []
    for step in (0, *config.switches):
        engine = build_engine(config, first_step=step)
        needs, size = memory.form_needs(engine), memory.accounting.checkpoint_bytes(engine)
        engine.train_step(step_batches(config, step, 0, 1))
        found.append((needs, size, sum(memory.accounting.measured_rank_bytes(engine).values())))
    return found


@pytest.mark.parametrize(("stage", "method"), [(1, "slope"), (2, "slope"), (3, "slope"), (1, "srste")])
def test_what_the_other_form_needs_is_what_it_takes(ranks, stage, method):
    config = small_config(slope={"method": method, "dense_tail": 0.5}, steps=4)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=stage))
    (sparse, size, held), (dense, dense_size, dense_held) = ranks.run(needs_of, config, world=1)[0]
    assert sparse == (held, dense_held)
    # 7 matrices of 2 blocks of width 64: their masks, and their masked copies in fp32.
    masked = (2 * 12 - 3) * 64 * 64
    masks = 4 * masked + masked // 8 if method == "srste" else 0
    assert dense == (dense_held, held + masks)
    patterns = masked // 8 + masked // 16 if method == "slope" else 0
    assert size == dense_size + patterns, "a checkpoint of the larger form"


def test_a_form_without_room_is_refused_in_one_sentence():
    config = small_config(slope={"dense_tail": 0.5})
    assert memory.form_problem(config, 8 * GIB, None) is None
    assert memory.form_problem(config, 8 * GIB, ROOMY) is None
    said = memory.form_problem(config, 8 * GIB + 1, ROOMY)
    assert said.startswith(
        "dense steps (--slope-dense-start, --slope-dense-tail) need 8.00 GiB of a GPU for weights, gradients and "
        "optimizer, and it has 8.00 GiB: take a --micro-batch-size under 2, --recompute full,"
    )
    assert said.endswith("a --tensor-parallel above 1, or leave them out")
