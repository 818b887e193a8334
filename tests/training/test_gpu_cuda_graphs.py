"""CUDA graphs of micro-batches on a GPU: the eager steps to the bit, without waiting, in no more memory."""

import dataclasses
import warnings

import pytest
import torch

from helpers.models import build_engine, small_config, step_batches

STEPS = 8
SLOPE = {"adapter_rank": 16, "lazy_fraction": 0.5, "backward_mask_interval": 3}
CASES = {
    "paper": {"slope": SLOPE},
    "full": {"slope": {**SLOPE, "mode": "full"}},
    "e4m3": {"slope": {"fp8": "current"}},
    "dense": {"slope": {"enabled": False}},
    "extended-srste": {"slope": {"method": "extended-srste"}},
    "sste": {"slope": {"method": "sste"}},
    "fst": {"slope": {"method": "fst", "fst_mask_interval": 3, "fst_dense_tail": 0.0}},
    "recomputed": {"slope": SLOPE, "recompute": "full"},
    "gated": {"slope": SLOPE, "gated": True},
    "bert": {"slope": SLOPE, "bert": True},
    "dropout": {"slope": SLOPE, "dropout": 0.1},
    "bert with dropout": {"slope": SLOPE, "bert": True, "dropout": 0.1},
}


# As a run compiles its norms, activations, masks and losses; it takes longer than the steps.
COMPILED = ("paper", "extended-srste", "gated")


def with_graphs(config, asked: str, dropout: float = 0.0):
    train = dataclasses.replace(config.train, cuda_graphs=asked)
    return dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, dropout=dropout))


def trained(config):
    """Of each step loss, norm and validation loss; the masters at the end, summed; and what was captured."""
    from megatron.core import parallel_state

    engine = build_engine(config, torch.bfloat16)
    at = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = []
    for step in range(STEPS):
        result = engine.train_step(step_batches(config, step, *at))
        found.append((result.loss, result.grad_norm, engine.evaluate(step_batches(config, 90, *at))))
    masters = [flat.double().sum().item() for flat in engine.optimizer.fp32_groups_flat_partition]
    functions = engine.graphs.functions if engine.graphs else []
    return found, masters, [function.graph is not None for function in functions]


def on_and_off(config, dropout, compiled):
    import torch._dynamo

    from slope_megatron.training import deterministic

    # The ranks of tests run without the compiler.
    torch._dynamo.config.disable = not compiled
    deterministic.switch_on()
    return [trained(with_graphs(config, asked, dropout)) for asked in ("off", "on")]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_the_eager_ones_to_the_bit(gpu_ranks, name):
    settings = dict(CASES[name])
    dropout, config = settings.pop("dropout", 0.0), small_config(steps=STEPS, **settings)
    eager, replayed = gpu_ranks.run(on_and_off, config, dropout, name in COMPILED, world=1)[0]
    assert replayed[:2] == eager[:2] and len({loss for loss, *_ in eager[0]}) == STEPS
    assert eager[2] == [] and all(replayed[2])


# World size, tensor-parallel ranks, settings.
LAYOUTS = {
    "TP 2 with sequence parallelism": (2, 2, {"sequence_parallel": True, "slope": SLOPE}),
    "TP 2, full, dropout": (2, 2, {"slope": {**SLOPE, "mode": "full"}, "dropout": 0.1}),
    "DP 2": (2, 1, {"slope": SLOPE}),
    "DP 2, dense": (2, 1, {"slope": {"enabled": False}}),
    "TP 2 x DP 2": (4, 2, {"sequence_parallel": True, "slope": SLOPE}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_replayed_steps_with_collectives_are_the_eager_ones_to_the_bit(gpu_ranks, name):
    world, tensor, settings = LAYOUTS[name]
    settings = dict(settings)
    dropout = settings.pop("dropout", 0.0)
    config = small_config(steps=STEPS, tensor_parallel=tensor, **settings)
    for eager, replayed in gpu_ranks.run(on_and_off, config, dropout, False, world=world, tensor_parallel=tensor):
        assert replayed[:2] == eager[:2] and len({loss for loss, *_ in eager[0]}) == STEPS
        assert eager[2] == [] and all(replayed[2])


def waits(config):
    """How often the host waits for the GPU in the micro-batches of a replayed step, and in all of it."""
    engine = build_engine(config, torch.bfloat16)
    for step in range(4):
        engine.train_step(step_batches(config, step, 0, 1))
    assert engine.accumulation.replayed.graph is not None
    batches = [{name: value.pin_memory() for name, value in one.items()} for one in step_batches(config, 4, 0, 1)]
    torch.cuda.set_sync_debug_mode("error")
    engine.accumulation.run(batches, engine.mean_counts(batches))
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine.train_step(batches)
    torch.cuda.set_sync_debug_mode("default")
    return sorted(str(warning.message) for warning in said if "synchroniz" in str(warning.message))


@pytest.mark.gpu
def test_a_replayed_step_waits_at_most_three_times(gpu_ranks):
    said = gpu_ranks.run(waits, with_graphs(small_config(slope={"adapter_rank": 0}), "on"), world=1)[0]
    assert 1 <= len(said) <= 3, said


def peak(config):
    """Reserved bytes at the highest, from the second step on: the first one chooses kernels."""
    engine = build_engine(config, torch.bfloat16)
    batches = []
    for batch in step_batches(config, 0, 0, 1):
        tokens = {name: batch[name].repeat(32, 64)[:, :1024] for name in ("tokens", "labels", "loss_mask")}
        batches.append({**tokens, "position_ids": torch.arange(1024).repeat(len(tokens["tokens"]), 1)})
    engine.train_step(batches)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        engine.train_step(batches)
    assert engine.graphs is None or engine.accumulation.replayed.graph is not None
    return torch.cuda.max_memory_reserved()


@pytest.mark.gpu
def test_graphs_take_no_more_memory(gpu_ranks):
    config = small_config(slope={"adapter_rank": 0})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=1024))
    eager, replayed = (gpu_ranks.run(peak, with_graphs(config, asked), world=1)[0] for asked in ("off", "on"))
    assert replayed < 1.02 * eager + 2**24, (eager, replayed)
