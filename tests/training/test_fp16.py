"""fp16 with a dynamic loss scale: near fp32, overflows skipped and counted, the scale resumed."""

import dataclasses
import itertools

import pytest
import torch

from helpers.models import build_engine, save, step_batches
from helpers.zero_runs import config_of, oracle

STEPS = 8


def fp16_config(stage, scale=65536.0, **more):
    config = config_of(stage, **more)
    # Without adapters: their first gradients are large, and this is about the scale.
    slope = dataclasses.replace(config.slope, adapter_rank=0 if scale > 65536.0 else config.slope.adapter_rank)
    optimizer = dataclasses.replace(config.optimizer, initial_loss_scale=scale, loss_scale_hysteresis=1)
    return dataclasses.replace(config, slope=slope, optimizer=optimizer)


def results_of(config, run=None, resume=False):
    """(loss, loss scale, skipped, learning rate) of the steps, and the optimizer's counters."""
    from megatron.core import parallel_state

    from slope_megatron.training.checkpoint import engine_state, store

    engine = build_engine(config, torch.float16)
    if resume:
        store.load(engine, store.newest(run))
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = []
    while engine.steps_done < STEPS:
        result = engine.train_step(step_batches(config, engine.steps_done, replica, replicas))
        found.append((result.loss, result.loss_scale, result.skipped, result.learning_rate))
        if run and engine.steps_done == 5 and not resume:
            save(engine, run)
    engine_state.link_optimizer_state(engine)
    return found, engine_state.optimizer_steps(engine), engine.skipped_steps


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_trains_as_fp32_does(ranks, stage):
    losses, *_ = oracle(ranks)
    for steps, counters, skipped in ranks.run(results_of, fp16_config(stage), world=2):
        # 11 bits of mantissa in every product.
        assert [loss for loss, *_ in steps] == pytest.approx(losses, rel=1e-2)
        assert skipped == 0 and counters["dense"] == STEPS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflows_are_skipped_and_counted(ranks, tmp_path, stage):
    config = fp16_config(stage, 2.0**22)
    steps, counters, skipped = ranks.run(results_of, config, tmp_path, world=2)[0]
    taken = [not skip for _, _, skip, _ in steps]
    assert skipped == taken.count(False) > 1 and taken.count(True) > 2, "some steps must overflow, some must not"
    # Skipped steps count for the schedule, not for the optimizer's bias correction.
    assert [rate for *_, rate in steps] == [config.optimizer.lr_at(step, 10) for step in range(STEPS)]
    assert counters["dense"] == taken.count(True)
    for (_, scale, skip, _), (_, following, _, _) in itertools.pairwise(steps):
        assert following == (scale / 2 if skip else scale)
    # Nothing was updated by a skipped step: the model still gives the loss that it gave before. Data repeat every 2.
    first = taken.index(True)
    assert steps[0][0] == pytest.approx(steps[first - first % 2][0], rel=1e-6) or first < 2
    resumed = ranks.run(results_of, config, tmp_path, True, world=2)[0]
    assert resumed == (steps[5:], counters, skipped)
