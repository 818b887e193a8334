"""Runs at every ZeRO stage: what they did and became, beside one process, and what their checkpoints give back."""

import dataclasses

import pytest
import torch

from helpers.models import build_engine, go_on, save, small_config, step_batches
from helpers.numerics import relative_error
from helpers.plain_training import FAMILIES, SLOPE, SLOPE_ON_GPUS, reference
from slope_megatron.config import Config

STEPS = 8
LAYERS = "decoder.layers.1.mlp.linear_fc2"
RESIDENT = {"zero3_resident_operands": True}
OFFLOAD = {"offload_optimizer": "cpu"}


def config_of(stage=1, *, family="opt", parallel=None, optimizer=None, slope=SLOPE, **more) -> Config:
    config = small_config(**FAMILIES[family], slope=slope, **{"steps": 10, "layers": 2, **more})
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, zero_stage=stage, **(parallel or {})),
        optimizer=dataclasses.replace(config.optimizer, adam_backend="torch", **(optimizer or {})),
    )


def canonical_state(engine):
    """This rank's parts of model, masters and moments by canonical name, and the step counters."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from slope_megatron.training.checkpoint import engine_state

    engine_state.link_optimizer_state(engine)
    parts = []
    for entries in engine_state.sharded_engine_state(engine, filled=True).values():
        for entry in entries.values():
            pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            parts += [
                (piece.key, piece.global_offset, piece.global_shape, piece.data.detach().clone())
                for piece in pieces
                if isinstance(piece, ShardedTensor)
            ]
    return parts, engine_state.optimizer_steps(engine)


def train(config, dtype):
    """What a run did and became, what its ranks hold, and whether operands were there between two steps."""
    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.training.telemetry import accounting

    engine = build_engine(config, dtype)
    steps = go_on(engine, 4)
    # In the middle of training, which it must not change.
    val_loss = engine.evaluate(step_batches(config, 0, 0, 1))
    steps += go_on(engine, STEPS)
    resident = [module.has_operands for module in sparse_modules(engine.model)]
    held = accounting.measured_rank_bytes(engine), accounting.formula_rank_bytes(engine)
    whole = accounting.state_bytes(engine), accounting.parameter_count(engine), accounting.double_pruning(engine)
    return steps, canonical_state(engine), held, (*whole, val_loss), resident


def assemble(states) -> dict[str, torch.Tensor]:
    """Whole tensors by canonical name; parts that several ranks hold must agree to the bit."""
    whole, seen = {}, set()
    for parts, _ in states:
        for name, offset, shape, data in parts:
            target = whole.setdefault(name, torch.zeros(shape, dtype=data.dtype))
            place = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
            assert (name, offset) not in seen or torch.equal(target[place], data), f"replicas of {name} differ"
            seen.add((name, offset))
            target[place] = data
    return whole


ORACLE: dict = {}


def oracle(ranks, family="opt"):
    """Losses, norms and final tensors of one process with plain torch; once a family and device."""
    key = ranks.device, family
    if key not in ORACLE:
        slope = SLOPE if ranks.device == "cpu" else SLOPE_ON_GPUS
        losses, norms, parts = ranks.run(reference, config_of(family=family, slope=slope), STEPS, world=1)[0]
        assert losses[-1] < 0.9 * losses[0], "the reference must learn, or equality says little"
        assert max(norms) > config_of().optimizer.clip_grad, "clipping must have been active"
        ORACLE[key] = losses, norms, assemble([(parts, None)])
    return ORACLE[key]


def check_against_oracle(ranks, config, *, replicas=2, family="opt"):
    losses, norms, tensors = oracle(ranks, family)
    size = config.parallel.tensor_parallel
    results = ranks.run(train, config, torch.float32, world=size * replicas, tensor_parallel=size)
    for steps, *_ in results:
        # fp32: only the order of sums differs (DESIGN section 2).
        assert [loss for loss, _ in steps] == pytest.approx(losses, rel=1e-5)
        assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-4)
    whole = assemble([state for _, state, *_ in results])
    for name, tensor in tensors.items():
        if name.endswith("weight_pattern"):
            assert torch.equal(whole[name], tensor), name
        elif tensor.dtype != torch.uint8:
            # AdamW divides by the root of tiny second moments, which magnifies rounding.
            assert relative_error(whole[name], tensor) < 1e-3, name
    for _, _, (measured, formula), *_ in results:
        assert measured == formula
    return results


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save_and_go_on(config, run):

    engine = build_engine(config)
    go_on(engine, 7)
    save(engine, run)
    state = canonical_state(engine)
    return state, go_on(engine, 9), canonical_state(engine)


def load_and_go_on(config, run):
    from slope_megatron.training.checkpoint import store
    from slope_megatron.training.zero import partitions

    engine = build_engine(config)
    # Garbage everywhere: what is right afterwards came from the files.
    with torch.no_grad():
        for partition in partitions.of(engine.optimizer):
            partition.masters.fill_(7.0)
        for parameter in engine.model.parameters():
            parameter.fill_(7.0)
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.fill_(7.0)
        for name, buffer in engine.model.named_buffers():
            if name.endswith(("_pattern", "_column")):
                buffer.fill_(255)
    folder = store.newest(run)
    store.check_state(folder, config)
    store.load(engine, folder)
    state = canonical_state(engine)
    return state, go_on(engine, 9), canonical_state(engine)


def check_loading(ranks, run, saved, loaded, *, world=2):
    expected = ranks.run(save_and_go_on, saved, run, world=world)
    found = {}
    for config in loaded:
        results = ranks.run(load_and_go_on, config, run, world=world)
        whole, before = assemble([state for state, *_ in results]), assemble([state for state, *_ in expected])
        assert whole.keys() == before.keys() and f"optimizer.exp_avg.{LAYERS}.adapter_r" in whole
        different = [name for name, tensor in before.items() if not torch.equal(whole[name], tensor)]
        assert not different
        assert results[0][0][1] == expected[0][0][1], "step counters"
        for (_, steps, _), (_, expected_steps, _) in zip(results, expected, strict=True):
            assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected_steps], rel=1e-5)
        found[config] = results
    return expected, found


def check_exact_resume(ranks, run, config):
    expected, found = check_loading(ranks, run, config, [config])
    for (_, steps, (parts, _)), (_, expected_steps, (expected_parts, _)) in zip(found[config], expected, strict=True):
        assert steps == expected_steps
        for (name, *_, tensor), (*_, expected_tensor) in zip(parts, expected_parts, strict=True):
            assert torch.equal(tensor, expected_tensor), name
