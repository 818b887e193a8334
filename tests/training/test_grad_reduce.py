"""--grad-reduce-dtype: gradients are summed over the replicas in the type that was asked for, at every ZeRO stage."""

import dataclasses

import pytest
import torch

from helpers.models import build_engine, go_on, small_config, step_batches
from helpers.numerics import relative_error
from helpers.resumed_runs import assert_same, resumed, uninterrupted
from helpers.zero_runs import OFFLOAD, check_exact_resume, config_of


def errors(config, dtype):
    """Relative error of each parameter's reduced gradient: beside the sum, in fp64, of what each micro-batch gave."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad
    from megatron.core import parallel_state

    engine = build_engine(config, dtype)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    named = dict(engine.model.named_parameters())
    sums, found = {}, {}

    def adder(name):
        def add(gradient):
            sums[name] = sums.get(name, 0.0) + gradient.detach().double()

        return add

    for name, parameter in named.items():
        parameter.register_hook(adder(name))

    def note(part):
        if part == "update":
            found.update({name: safe_get_full_grad(named[name]).double() for name in sums})

    engine.observers.append(note)
    assert not engine.train_step(step_batches(config, 0, replica, replicas)).skipped
    for total in sums.values():
        dist.all_reduce(total)
    return {name: relative_error(found[name], total / replicas) for name, total in sums.items()}


def config_for(stage, reduced, **parallel):
    """Three replicas, which a division in bf16 or fp16 cannot do without rounding, and two micro-batches."""
    config = config_of(stage, slope={}, parallel={"grad_reduce_dtype": reduced, **parallel})
    data = dataclasses.replace(config.data, global_batch_size=12)
    return dataclasses.replace(
        config, data=data, optimizer=dataclasses.replace(config.optimizer, initial_loss_scale=1024.0)
    )


@pytest.mark.parametrize("parallel", [{}, pytest.param(OFFLOAD, marks=pytest.mark.slow)], ids=["", "offload"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_sums_are_fp32s(ranks, stage, dtype, parallel):
    """A few roundings of 2^-24; in the parameters' own type, bf16's 2^-9 or fp16's 2^-12 is seen."""
    for exact in ranks.run(errors, config_for(stage, "fp32", **parallel), dtype, world=3):
        assert len(exact) > 20 and max(exact.values()) < 4 * 2**-24
    seen = 2**-10 if dtype == torch.bfloat16 else 2**-13
    rounding = "bf16" if dtype == torch.bfloat16 else "auto"
    for rounded in ranks.run(errors, config_for(stage, rounding, **parallel), dtype, world=3):
        assert min(rounded.values()) > seen / 4 and seen < max(rounded.values()) < 8 * seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_sums_halve_what_fp32_runs_send(ranks, stage, dtype):
    for found in ranks.run(errors, config_for(stage, "bf16"), dtype, world=3):
        assert 2**-10 < max(found.values()) < 2**-7


@pytest.mark.slow
def test_auto_is_fp32_for_bf16s_sums_and_else_the_parameters_type(ranks):
    for stage, dtype, name in ((2, torch.float32, "fp32"), (2, torch.bfloat16, "bf16"), (1, torch.bfloat16, "fp32")):
        auto, named = (ranks.run(errors, config_for(stage, reduced), dtype, world=3) for reduced in ("auto", name))
        assert auto == named


def sent(config, dtype):
    """Bytes of gradients that this rank sends in a step, and the formula's."""
    from megatron.core import parallel_state

    from slope_megatron.bench.collectives import Counted
    from slope_megatron.planner.traffic import data_parallel_bytes
    from slope_megatron.training.zero import partitions

    engine = build_engine(config, dtype)
    go_on(engine, 1)
    with Counted({"data": parallel_state.get_data_parallel_group()}) as counted:
        go_on(engine, 2)
    replicas = parallel_state.get_data_parallel_world_size()
    elements = sum(partitions.shape_of(parameter).numel() for group in engine.members.values() for parameter in group)
    stage, asked = config.parallel.zero_stage, config.parallel.grad_reduce_dtype
    formula = data_parallel_bytes(elements, replicas, stage, config.data.micro_batches(replicas), "bf16", asked)
    kinds = ("all-reduce", "reduce-scatter")
    return sum(counted.sent[kind, "data"] for kind in kinds), formula, counted.sent["all-gather", "data"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_sent_is_the_formula(ranks, stage):
    totals = {}
    for reduced in ("bf16", "fp32"):
        config = config_of(stage, slope={}, parallel={"grad_reduce_dtype": reduced})
        gradients, formula, weights = ranks.run(sent, config, torch.bfloat16, world=2)[0]
        # Beyond the formula: losses and norms.
        assert gradients == pytest.approx(formula["gradients"], rel=1e-3)
        # So small a model is gathered once a micro-batch at stage 3.
        assert weights == pytest.approx(formula["weights"] / (2 if stage == 3 else 1), rel=0.05)
        totals[reduced] = gradients
    assert totals["fp32"] == pytest.approx(2 * totals["bf16"], rel=1e-3)


@pytest.mark.slow
def test_resume_is_exact_in_bf16(ranks, tmp_path):
    config = small_config(slope={"adapter_rank": 4, "lazy_fraction": 0.5}, steps=10, keep_checkpoints=9)
    other = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, grad_reduce_dtype="bf16"))
    expected = ranks.run(uninterrupted, other, torch.bfloat16, tmp_path, (4,), world=2)
    for (results, state), (all_results, all_state) in zip(
        ranks.run(resumed, other, torch.bfloat16, tmp_path, 4, world=2), expected, strict=True
    ):
        assert results == all_results[4:]
        assert_same(state, all_state)
    # It may change in mid-run, as a layout may; the losses tell that it did.
    changed, _ = ranks.run(resumed, config, torch.bfloat16, tmp_path, 4, world=2)[0]
    assert changed != expected[0][0][4:]
    assert changed[0][0] == pytest.approx(expected[0][0][4][0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_exact_with_bf16_sums(ranks, tmp_path, stage):
    check_exact_resume(ranks, tmp_path, config_of(stage, parallel={"grad_reduce_dtype": "bf16"}))


def test_deepspeeds_json_says_nothing_where_nothing_is_asked():
    from slope_megatron.training.zero.partitions import deepspeed_config

    for reduced, dtype in (("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        settings = deepspeed_config(config_for(2, reduced), dtype, 2)
        assert "communication_data_type" not in settings and "reduce_scatter" not in settings["zero_optimization"]
    settings = deepspeed_config(config_for(1, "fp32"), torch.bfloat16, 2)
    assert settings["communication_data_type"] == "fp32" and settings["zero_optimization"]["reduce_scatter"]


def test_a_wrong_type_is_refused():
    with pytest.raises(ValueError, match="--grad-reduce-dtype is 'fp16': it must be one of auto, fp32, bf16"):
        config_for(1, "fp16")
