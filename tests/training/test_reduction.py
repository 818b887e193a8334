"""bf16 gradients over the replicas: exact fp32 means in the own partition, the norm and clipping of the whole."""

import dataclasses

import pytest
import torch

from helpers.models import build_engine, go_on, small_config
from helpers.numerics import relative_error

# tensor, pipeline and data parallel sizes, and more of the configuration. PP 2: tied copies of the embedding.
LAYOUTS = [
    (1, 1, 2, {}),
    (2, 1, 2, {"sequence_parallel": True}),
    pytest.param((1, 2, 2, {}), marks=pytest.mark.slow),
    pytest.param((1, 1, 4, {"gated": True}), marks=pytest.mark.slow),
]
ON_GPUS = [(1, 1, 2, {}), (2, 1, 2, {"sequence_parallel": True}), (1, 2, 2, {})]
SLOPE = {"adapter_rank": 4, "lazy_fraction": 1.0}


def build(config):
    return build_engine(config, torch.bfloat16)


def as_deepspeed_reduces(engine) -> None:
    """Give DeepSpeed back its all-reduce of everything, its norm, clipping and update, in fp32."""
    engine.deepspeed.communication_data_type = torch.float32
    engine.accumulation.bf16.reduce = engine.deepspeed.allreduce_gradients
    for name in ("_update_hp_grad", "zero_grad", "step"):
        delattr(engine.optimizer, name)
    for parameters in engine.optimizer.bf16_groups:
        for parameter in parameters:
            del parameter.gradient_sum


def both_ways(config):
    """Of our reduction and of DeepSpeed's: losses and norms of four steps, and this rank's masters after the first."""
    ours, theirs = build(config), build(config)
    as_deepspeed_reduces(theirs)
    found = []
    for engine in (ours, theirs):
        first = go_on(engine, 1)
        masters = [part.detach().clone() for part in engine.optimizer.fp32_groups_flat_partition]
        found.append((first, masters, go_on(engine, 4)))
    return found


def name(layout) -> str:
    return "x".join(map(str, layout[:3]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_what_deepspeed_computes_from_all_gradients(ranks, layout):
    check_both_ways(ranks, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ON_GPUS, ids=name)
def test_what_deepspeed_computes_over_nccl(gpu_ranks, layout):
    check_both_ways(gpu_ranks, layout)


def check_both_ways(ranks, layout):
    tensor, pipeline, data, more = layout
    sizes = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    config = small_config(**sizes, **more, slope=SLOPE)
    results = ranks.run(both_ways, config, world=tensor * pipeline * data, **sizes)
    for (ours, masters, later), (theirs, their_masters, their_later) in results:
        assert all(norm > config.optimizer.clip_grad for _, norm in ours), "clipping must be active"
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
        for own, other in zip(masters, their_masters, strict=True):
            assert own.shape == other.shape and relative_error(own, other) < 1e-6
        # From here on weights that lay between two bf16 numbers may have gone either way.
        for own, other in zip(later, their_later, strict=True):
            assert own == pytest.approx(other, rel=1e-3)


def in_one_pass(config):
    """Whether AdamW in one pass gives torch's losses, norms, masters, moments and weights; and whether it ran."""
    from slope_megatron.training.optim import one_pass

    calls, update, applies = [], one_pass.update, one_pass.applies
    one_pass.update = lambda *arguments: (calls.append(None), update(*arguments))
    found = []
    for wanted in (False, True):
        one_pass.applies = lambda optimizer, wanted=wanted: wanted
        engine = build(config)
        losses = go_on(engine, 1)
        optimizer = engine.optimizer
        state = [optimizer.optimizer.state[flat] for flat in optimizer.fp32_groups_flat_partition]
        moments = [one[name] for one in state for name in ("exp_avg", "exp_avg_sq")]
        assert all(float(one["step"]) == 1 for one in state)
        tensors = (*optimizer.fp32_groups_flat_partition, *moments, *optimizer.bf16_groups_flat)
        copies = [tensor.detach().clone() for tensor in tensors]
        found.append((losses + go_on(engine, 3), copies))
    one_pass.update, one_pass.applies = update, applies
    return found, len(calls)


@pytest.mark.parametrize("world", [1, 2])
def test_adamw_in_one_pass_is_torch_s(ranks, world):
    check_one_pass(ranks, world)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_adamw_in_one_pass_is_torch_s_on_a_gpu(gpu_ranks, world):
    check_one_pass(gpu_ranks, world)


def check_one_pass(ranks, world):
    for (theirs, ours), calls in ranks.run(in_one_pass, small_config(slope=SLOPE), world=world):
        assert calls == 3 and ours[0][0] == theirs[0][0]
        for own, other in zip(ours[0], theirs[0], strict=True):
            assert own == pytest.approx(other, rel=1e-3)
        for own, other in zip(ours[1], theirs[1], strict=True):
            # Weights between two bf16 numbers may go either way.
            assert relative_error(own.float(), other.float()) < (1e-6 if own.dtype == torch.float32 else 4e-3)


def reduced(config, sent, at_once):
    """Errors of each reduced partition against the replicas' sums in fp64, and how much of it there is."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from slope_megatron.training.zero import reduction

    reduction.ELEMENTS_AT_ONCE = at_once
    engine = build(config)
    assert engine.accumulation.bf16.sent == sent
    optimizer, group = engine.optimizer, parallel_state.get_data_parallel_group()
    reduce, errors = engine.accumulation.bf16.reduce, []

    def compared():
        expected = [whole.double() for whole in optimizer.fp32_groups_gradients_flat]
        reduce()
        for whole, own in zip(expected, optimizer.fp32_groups_gradient_flat_partition, strict=True):
            dist.all_reduce(whole, group=group)
            mean = whole.view(group.size(), -1)[group.rank()] / group.size()
            errors.append((relative_error(own.double(), mean), float(mean.norm())))

    engine.accumulation.bf16.reduce = compared
    go_on(engine, 2)
    return errors


SENT = [(torch.float32, 0, 1e-7), (torch.bfloat16, 5e-4, 4e-3)]


@pytest.mark.parametrize("at_once", [2**26, 1000], ids=["whole", "pieces"])
@pytest.mark.parametrize(("sent", "least", "most"), SENT)
def test_each_replica_gets_the_mean_of_its_partition(ranks, sent, least, most, at_once):
    check_partitions(ranks, sent, least, most, at_once)


@pytest.mark.gpu
@pytest.mark.parametrize(("sent", "least", "most"), SENT)
def test_each_replica_gets_the_mean_of_its_partition_over_nccl(gpu_ranks, sent, least, most):
    check_partitions(gpu_ranks, sent, least, most, at_once=1000)


def check_partitions(ranks, sent, least, most, at_once):
    config = small_config(slope=SLOPE)
    asked = "bf16" if sent == torch.bfloat16 else "auto"
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, grad_reduce_dtype=asked))
    for errors in ranks.run(reduced, config, sent, at_once, world=2):
        assert len(errors) == 2 * 4 and sum(size > 0 for _, size in errors) >= 6
        assert all(least <= error <= most for error, size in errors if size > 0), errors


def one_bad_replica(config):
    """Whether a step with an infinite gradient on the last rank alone was skipped, and what it left of the weights."""
    import torch.distributed as dist

    engine = build(config)
    before = [part.detach().clone() for part in engine.optimizer.fp32_groups_flat_partition]
    reduce = engine.accumulation.bf16.reduce

    def spoiled():
        if dist.get_rank() == dist.get_world_size() - 1:
            engine.optimizer.fp32_groups_gradients_flat[0][0] = float("inf")
        reduce()

    engine.accumulation.bf16.reduce = spoiled
    go_on(engine, 1)
    after = engine.optimizer.fp32_groups_flat_partition
    return engine.skipped_steps, all(map(torch.equal, before, after))


def test_one_replicas_infinity_skips_the_step_on_all(ranks):
    assert ranks.run(one_bad_replica, small_config(slope=SLOPE), world=2) == [(1, True)] * 2
