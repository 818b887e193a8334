"""A step that is skipped leaves nothing behind: the steps after it are those of a run that never took it.

Steps are spoiled before the optimizer has any state, before the adapters join, in the step in which they join, and
after it. The other run passes those steps by without a forward or a backward pass.
"""

import dataclasses
import math

import pytest
import torch

from helpers.models import build_engine, save, step_batches
from helpers.plain_training import SLOPE
from helpers.zero_runs import OFFLOAD, canonical_state, config_of

STEPS = 9
# The adapters join in step 4. The column pattern is chosen anew in step 2, too, which is skipped.
SPOILED = (0, 2, 4, 6)
ADAPTERS = {**SLOPE, "adapter_rank": 8, "lazy_fraction": 0.5, "backward_mask_interval": 3}
LAMB = {"optimizer": "lamb", "adam_backend": "auto"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def config_for(stage, parallel=None, slope=ADAPTERS, **optimizer):
    config = config_of(stage, parallel=parallel, slope=slope, steps=8, layers=1)
    optimizer = {"initial_loss_scale": 1024.0, "loss_scale_hysteresis": 1, **optimizer}
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
        # Two micro-batches, so that gradients are summed.
        data=dataclasses.replace(config.data, global_batch_size=4),
    )


def spoil_forward(engine):
    """A number of the last hidden state is not one: neither are the loss and most gradients."""

    def spoil(module, inputs, output):
        spoiled = output.clone()
        spoiled.view(-1)[3] = math.nan
        return spoiled

    return engine.model.decoder.final_layernorm.register_forward_hook(spoil).remove


def spoil_loss(engine):
    """The loss alone is infinite; the gradients stay as they are."""
    original = engine.forward_backward_reduce
    engine.forward_backward_reduce = lambda batches: original(batches) * math.inf
    return lambda: setattr(engine, "forward_backward_reduce", original)


def spoil_gradients(engine):
    """One number of a gradient is infinite; the loss stays as it is."""

    def spoil(gradient):
        spoiled = gradient.clone()
        spoiled.view(-1)[5] = math.inf
        return spoiled

    def hook(module, inputs, output):
        output[0].register_hook(spoil)

    return engine.model.decoder.layers[0].mlp.linear_fc2.register_forward_hook(hook).remove


SPOILERS = (spoil_forward, spoil_loss, spoil_gradients)


def batches_of(engine, step):
    from megatron.core import parallel_state

    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return step_batches(engine.config, step, replica, replicas)


def spoiled_step(engine, step, spoil):
    """On the last rank alone."""
    import torch.distributed as dist

    restore = spoil(engine) if dist.get_rank() == dist.get_world_size() - 1 else lambda: None
    result = engine.train_step(batches_of(engine, step))
    restore()
    return result


def passed_by(engine, scale_falls):
    """The step counts, and nothing else happens but what the schedule says of it."""
    engine.enter_phase()
    engine.steps_done += 1
    engine.refresh(engine.steps_done)
    if scale_falls:
        engine.optimizer.loss_scaler.update_scale(True)


def run_to_the_end(engine, spoil, scale_falls=False, save_at=None, run=None):
    """Losses, gradient norms and loss scales of the steps that were taken, and the final state.

    Without `spoil` the steps in question are passed by.
    """

    taken = []
    while engine.steps_done < STEPS:
        step = engine.steps_done
        if step not in SPOILED:
            result = engine.train_step(batches_of(engine, step))
            assert not result.skipped and not result.bad and math.isfinite(result.grad_norm)
            taken.append((result.loss, result.grad_norm, result.loss_scale))
        elif spoil:
            result = spoiled_step(engine, step, spoil)
            # fp16 gradients overflow by design.
            assert result.skipped and result.bad != scale_falls
        else:
            passed_by(engine, scale_falls)
        if engine.steps_done == save_at:
            save(engine, run)
    parts, counters = canonical_state(engine)
    return taken, parts, counters


def assert_same(found, expected):
    """`found` may have begun later."""
    assert found[0] == expected[0][-len(found[0]) :]
    assert found[2] == expected[2], "step counters"
    for (name, *_, tensor), (*_, right) in zip(found[1], expected[1], strict=True):
        assert torch.equal(tensor, right), name


def compare(config, dtype, run):
    """Each way to spoil a step beside the run that passes it by; and a resume right after a spoiled step."""
    from slope_megatron.training.checkpoint import store

    passing = {}
    for spoil in SPOILERS:
        scale_falls = spoil is spoil_gradients and dtype == torch.float16
        if scale_falls not in passing:
            passing[scale_falls] = run_to_the_end(build_engine(config, dtype), None, scale_falls)
        expected = passing[scale_falls]
        saves = {"save_at": SPOILED[-1] + 1, "run": run} if spoil is spoil_forward else {}
        assert_same(run_to_the_end(build_engine(config, dtype), spoil, scale_falls, **saves), expected)
    resumed = build_engine(config, dtype)
    store.load(resumed, store.newest(run))
    assert_same(run_to_the_end(resumed, None), passing[False])


@pytest.mark.parametrize("parallel", [{}, OFFLOAD], ids=["", "offload"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_outlives_a_spoiled_step(ranks, tmp_path, stage, dtype, parallel):
    ranks.run(compare, config_for(stage, parallel), dtype, tmp_path, world=1)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, OFFLOAD], ids=["", "offload"])
@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "fp16"), (3, "bf16")])
def test_of_two_replicas_one_is_spoiled(ranks, tmp_path, stage, dtype, parallel):
    ranks.run(compare, config_for(stage, parallel), DTYPES[dtype], tmp_path, world=2)


@pytest.mark.parametrize(
    ("stage", "parallel", "slope", "optimizer"),
    [
        (3, {}, {"adapter_rank": 0}, {}),
        # DeepSpeed's for the CPU, which is compiled.
        pytest.param(2, OFFLOAD, ADAPTERS, {"adam_backend": "auto"}, marks=pytest.mark.slow),
        (3, OFFLOAD, ADAPTERS, LAMB),
        (1, {}, {"method": "srste"}, LAMB),
        (2, OFFLOAD, {"method": "fst", "fst_mask_interval": 3}, {}),
    ],
    ids=["no adapters", "another AdamW", "LAMB", "SR-STE", "FST"],
)
def test_whatever_is_trained(ranks, tmp_path, stage, parallel, slope, optimizer):
    ranks.run(compare, config_for(stage, parallel, slope, **optimizer), torch.bfloat16, tmp_path, world=1)


def overflow_to_the_end(config):
    """Loss scales of four steps whose gradients overflow, and whether they count as bad."""
    engine = build_engine(config, torch.float16)
    results = [spoiled_step(engine, step, spoil_gradients) for step in range(4)]
    return [(result.loss_scale, result.bad) for result in results]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_is_bad_once_the_loss_scale_cannot_come_down(ranks, stage):
    [found] = ranks.run(overflow_to_the_end, config_for(stage, initial_loss_scale=4.0), world=1)
    assert found == [(4.0, False), (2.0, False), (1.0, True), (1.0, True)]


def spoil_replicated_gradient(engine):
    """Of a parameter that all tensor-parallel ranks have, whose copies are trained alike without being compared."""

    def spoil(gradient):
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = math.nan
        return spoiled

    return engine.model.decoder.final_layernorm.weight.register_hook(spoil).remove


def one_spoiled_rank(config, dtype, spoil):
    """(loss is finite here, skipped, bad) of three steps, the second one spoiled; and the weights."""
    engine = build_engine(config, dtype)
    found = []
    for step in range(3):
        result = spoiled_step(engine, step, spoil if step == 1 else lambda _: lambda: None)
        found.append((math.isfinite(result.loss), result.skipped, result.bad))
    return found, [parameter.detach().clone() for parameter in engine.model.parameters()]


@pytest.mark.parametrize(
    ("dtype", "spoil"),
    [(torch.bfloat16, spoil_replicated_gradient), (torch.float16, spoil_loss)],
    ids=["gradient", "loss"],
)
def test_tensor_parallel_ranks_decide_together(ranks, dtype, spoil):
    config = config_for(1, {"tensor_parallel": 2})
    for rank, (found, weights) in enumerate(
        ranks.run(one_spoiled_rank, config, dtype, spoil, world=2, tensor_parallel=2)
    ):
        loss_is_finite = spoil is not spoil_loss or rank == 0
        assert found == [(True, False, False), (loss_is_finite, True, True), (True, False, False)]
        assert all(torch.isfinite(weight).all() for weight in weights)
