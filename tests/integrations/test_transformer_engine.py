"""Transformer Engine's norms and attention around packed linears, with a stand-in for it in plain torch."""

import dataclasses

import pytest
import torch

from helpers.megatron_training import Host, answer_as_a_gpu, arguments, build, train, transformer_config
from helpers.te_ranks import te_ranks

pytestmark = pytest.mark.slow
HOST = Host(slope={"backward_mask_interval": 2})
ENGINE = dataclasses.replace(HOST, engine=True)
LLAMA = {"normalization": "RMSNorm", "qk_layernorm": True, "num_query_groups": 2, "add_bias_linear": False}


@pytest.fixture(scope="module")
def engine_ranks():
    return te_ranks()


@pytest.mark.parametrize("config", [{}, {**LLAMA, "gated_linear_unit": True}], ids=["gpt", "llama"])
def test_losses_are_the_local_spec_s(config, ranks, engine_ranks):
    host = dataclasses.replace(HOST, config=config)
    (local,) = ranks.run(train, host, world=1)
    (engine,) = engine_ranks.run(train, dataclasses.replace(host, engine=True), world=1)
    assert engine.losses == pytest.approx(local.losses, rel=1e-5) and local.losses[-1] < local.losses[0] - 0.5


def test_sequence_parallel_ranks_are_one(engine_ranks):
    (alone,) = engine_ranks.run(train, ENGINE, world=1)
    cut = dataclasses.replace(ENGINE, config={"sequence_parallel": True})
    for found in engine_ranks.run(train, cut, world=2, tensor_parallel=2):
        assert found.losses == pytest.approx(alone.losses, rel=1e-5)


def test_context_parallel_ranks_are_one(engine_ranks):
    """Adapters, too; gradients, and the distributed optimizer's parts, go over context-parallel ranks."""
    slope = {**ENGINE.slope, "adapter_rank": 4, "lazy_fraction": 0.34}
    host = dataclasses.replace(ENGINE, slope=slope, look_at=(4,))
    (alone,) = engine_ranks.run(train, host, world=1)
    cut = engine_ranks.run(train, host, world=2, context_parallel=2)
    for found in cut:
        assert found.losses == pytest.approx(alone.losses, rel=1e-5)
    assert same_states(cut[0].states, cut[1].states) and same_columns(cut[0].states, alone.states)
    plain = dataclasses.replace(ENGINE, look_at=(4,))
    over = dataclasses.replace(plain, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    (alone,) = engine_ranks.run(train, plain, world=1)
    sharded = engine_ranks.run(train, over, world=2, context_parallel=2)
    assert sharded[0].losses == pytest.approx(alone.losses, rel=1e-5)
    assert same_states(sharded[0].states, sharded[1].states)


def same_states(ours, theirs) -> bool:
    return all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0].keys() | theirs[0].keys())


def same_columns(ours, theirs) -> bool:
    """Whether the second pruning is the same but for ties that rounding decides."""
    names = [name for name in ours[0] if name.endswith("weight_column")]
    return all((ours[0][name] != theirs[0][name]).float().mean() < 0.01 for name in names)


def test_norms_centered_at_zero_start_as_the_others(engine_ranks):
    """They are the same functions; where the optimizer takes their weights is not."""
    (plain,) = engine_ranks.run(train, ENGINE, world=1)
    centered = dataclasses.replace(ENGINE, config={"layernorm_zero_centered_gamma": True})
    (found,) = engine_ranks.run(train, centered, world=1)
    assert found.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)


def check_parts():
    """The model's norms, attention and linears, by their classes' homes."""
    from slope_megatron.config import SlopeConfig
    from slope_megatron.integrations import cpu_host

    cpu_host.prepare()
    answer_as_a_gpu()
    slope = SlopeConfig(backend="reference")
    (model,) = build(transformer_config(ENGINE), arguments(ENGINE), slope, engine=True)
    block = model.decoder.layers[1]
    parts = (block.input_layernorm, block.pre_mlp_layernorm, block.self_attention.core_attention, block.mlp.linear_fc1)
    return [f"{type(part).__module__}.{type(part).__name__}" for part in (*parts, model.decoder.final_layernorm)]


def test_norms_and_attention_are_transformer_engine_s(engine_ranks):
    norm = "transformer_engine.pytorch.norms.LayerNorm"
    attention = "megatron.core.extensions.transformer_engine.TEDotProductAttention"
    linear = "slope_megatron.layers.tensor_parallel.SlopeColumnParallelLinear"
    assert engine_ranks.run(check_parts, world=1) == [[norm, norm, attention, linear, norm]]


# In names of norms, embeddings and biases; and of a linear's state of FP8.
SHARED, STATE = (".layer_norm_", "embeddings.weight", ".bias"), "extra_state"


def exchange_checkpoints(folder):
    """Names in checkpoints of a dense model under Transformer Engine, a sparse one, and a sparse one of the local spec;
    what the first two read of each other.
    """
    import torch
    from megatron.core import dist_checkpointing

    from slope_megatron.config import SlopeConfig
    from slope_megatron.integrations import cpu_host
    from slope_megatron.models.canonical import sharded_state_dict

    cpu_host.prepare()
    answer_as_a_gpu()
    sparse, dense = SlopeConfig(backend="reference"), SlopeConfig(enabled=False)
    models = {
        name: build(transformer_config(ENGINE), arguments(ENGINE), slope, engine)[0]
        for name, slope, engine in (("dense", dense, True), ("sparse", sparse, True), ("local", sparse, False))
    }
    models["dense"].config.hetereogenous_dist_checkpoint = True
    tensors = {name: sharded_state_dict(model) for name, model in models.items()}
    names = {name: {entry.key for entry in state.values() if STATE not in entry.key} for name, state in tensors.items()}
    equal = {}
    for number, (source, target) in enumerate((("dense", "sparse"), ("sparse", "dense"), ("local", "sparse"))):
        with torch.no_grad():
            for index, parameter in enumerate(models[source].parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number + index)))
        place = folder / f"{source}-{target}"
        place.mkdir()
        dist_checkpointing.save(sharded_state_dict(models[source]), str(place))
        wanted = {
            local: entry
            for local, entry in tensors[target].items()
            if any(part in entry.key for part in SHARED) and STATE not in entry.key
        }
        loaded = dist_checkpointing.load(dict(wanted), str(place))
        held = {entry.key: entry.data for entry in tensors[source].values() if hasattr(entry, "data")}
        equal[source, target] = [torch.equal(loaded[local], held[entry.key]) for local, entry in wanted.items()]
    return names, equal


def test_checkpoints_are_read_by_each_other(engine_ranks, tmp_path):
    ((names, equal),) = engine_ranks.run(exchange_checkpoints, tmp_path, world=1)
    assert names["sparse"] == names["local"]
    packed = {name for name in names["sparse"] if name.endswith(("_pattern", "_column"))}
    assert names["sparse"] - packed == names["dense"] and len(packed) == 2 * 15
    # Four blocks of two norms with two tensors each and four biases; the final norm's bias; two embeddings.
    assert all(len(found) == 4 * (4 + 4) + 3 and all(found) for found in equal.values()), equal
