"""The same seed gives the same model at every layout: one digest, printed, for TP 1, 2, 3, 4 x PP 1, 2."""

import hashlib

import pytest
import torch

from helpers.models import VOCABULARY


def config_of(gated, tensor_parallel, pipeline_parallel):
    """Widths that 1, 2, 3 and 4 ranks can share; two kinds of blocks, one of them with a pattern of its own."""
    from slope_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, SlopeConfig

    llama = {"activation": "silu", "gated_mlp": True, "normalization": "RMSNorm", "position": "rope"}
    return Config(
        slope=SlopeConfig(adapter_rank=4, nm_by_block="3=1:2", dense_blocks="2"),
        model=ModelConfig(
            num_layers=4,
            hidden_size=192,
            ffn_hidden_size=384,
            num_attention_heads=24 if gated else 12,
            num_query_groups=12,
            vocab_multiple=48,
            **({**llama, "tie_embeddings": False, "linear_bias": False} if gated else {}),
        ),
        parallel=ParallelConfig(tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel),
        data=DataConfig(seq_length=12),
    )


def shards_of(config):
    from slope_megatron.models.canonical import shards
    from slope_megatron.models.provider import build_model

    model = build_model(config, VOCABULARY, torch.float32)
    return [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(model)]


def digest(results) -> str:
    """Of the whole model; ranks that hold the same part must agree on it."""
    whole, covered = {}, {}
    for parts in results:
        for name, offset, shape, data in parts:
            target = whole.setdefault(name, torch.zeros(shape, dtype=data.dtype))
            seen = covered.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            place = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
            assert not seen[place].any() or torch.equal(target[place], data), f"copies of {name} differ"
            target[place] = data
            seen[place] = True
    assert all(seen.all() for seen in covered.values())
    found = hashlib.sha256()
    for name in sorted(whole):
        found.update(name.encode() + whole[name].numpy().tobytes())
    return found.hexdigest()


def digests(ranks, gated, layouts):
    found = {}
    for tensor_parallel, pipeline_parallel in layouts:
        sizes = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
        world = tensor_parallel * pipeline_parallel
        found[tensor_parallel, pipeline_parallel] = digest(
            ranks.run(shards_of, config_of(gated, **sizes), world=world, **sizes)
        )
        print(f"TP {tensor_parallel} x PP {pipeline_parallel}: {found[tensor_parallel, pipeline_parallel]}")
    return found


@pytest.mark.parametrize("gated", [False, True], ids=["opt", "llama"])
def test_one_digest_on_up_to_four_ranks(ranks, gated):
    assert len(set(digests(ranks, gated, [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]).values())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True], ids=["opt", "llama"])
def test_one_digest_on_up_to_eight_ranks(ranks, gated):
    assert len(set(digests(ranks, gated, [(1, 1), (3, 2), (4, 2)]).values())) == 1


def test_a_block_without_an_mlp_is_refused(ranks):
    assert "it would stay dense" in ranks.run(sparsify_no_mlp, world=1)[0]


def sparsify_no_mlp():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp

    from slope_megatron.config import SlopeConfig
    from slope_megatron.models.layer_spec import sparsify

    stock = get_gpt_layer_local_spec()
    stock.submodules.mlp = IdentityOp
    try:
        sparsify(stock, SlopeConfig(), 0)
    except ValueError as error:
        return str(error)
    return "nothing was raised"
