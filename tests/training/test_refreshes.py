"""Our engine says when values have changed: no forward, backward or recomputation refreshes operands for it."""

import dataclasses

import pytest

from helpers.models import build_engine, small_config, step_batches

STEPS = 4


def refreshes(config, dtype):
    """For each step, how often a linear's operands were built and brought up to date; and the pruned linears."""
    from slope_megatron.layers.kept_operands import KeptOperands
    from slope_megatron.models.layer_spec import pruned_modules

    counts = {"built": 0, "refreshed": 0}
    build, refresh = KeptOperands.__init__, KeptOperands.refresh

    def built(self, *arguments):
        counts["built"] += 1
        build(self, *arguments)

    def refreshed(self, weight):
        counts["refreshed"] += 1
        refresh(self, weight)

    KeptOperands.__init__, KeptOperands.refresh = built, refreshed
    engine = build_engine(config, dtype)
    found = []
    for step in range(STEPS):
        engine.evaluate(step_batches(config, 0, 0, 1))
        engine.train_step(step_batches(config, step, 0, 1))
        found.append(dict(counts))
        counts.update(built=0, refreshed=0)
    modules = pruned_modules(engine.model)
    return found, len(modules), {module.watches_values for module in modules}


@pytest.mark.parametrize(
    ("method", "recompute", "stage"),
    [
        ("slope", "none", 1),
        ("slope", "full", 2),
        ("slope", "none", 3),
        ("srste", "full", 1),
        ("sste", "full", 1),
        ("fst", "none", 1),
    ],
)
def test_one_refresh_a_step_and_none_in_a_forward(ranks, method, recompute, stage):
    import torch

    slope = {"method": method, "backward_mask_interval": 0, "fst_mask_interval": 100}
    config = small_config(slope=slope, recompute=recompute)
    parallel = dataclasses.replace(config.parallel, zero_stage=stage, zero3_resident_operands=stage == 3)
    optimizer = dataclasses.replace(config.optimizer, adam_backend="torch")
    config = dataclasses.replace(config, parallel=parallel, optimizer=optimizer)
    steps, linears, watching = ranks.run(refreshes, config, torch.bfloat16, world=1)[0]
    assert linears and watching == {False}
    # In place: what a CUDA graph reads stays where it is. Before the first step there is nothing to refresh.
    assert steps[0] == {"built": linears, "refreshed": linears}
    assert steps[1:] == [{"built": 0, "refreshed": linears}] * (STEPS - 1)
