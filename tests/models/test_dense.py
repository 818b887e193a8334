"""Dense weights into packed models and back: pruning on load is pruning the whole, at every layout."""

import dataclasses

import pytest
import torch

from helpers.dense_parts import assemble, dense_parts
from helpers.families import digest, hf_config, our_config, whole_tensors
from helpers.numerics import integers, relative_error


def architecture(name):
    """opt: ungated, tied; llama: gated, GQA, untied. Heads and groups for two ranks."""
    from slope_megatron.export.hf_config import model_config

    groups = {"num_attention_heads": 8, "num_key_value_heads": 2} if name == "llama" else {}
    return model_config(hf_config(name, **groups))


def dense_weights(model):
    """Random numbers under all canonical names; the vocabulary as it is, without padding."""
    from slope_megatron.models.shapes import canonical_shapes

    generator = torch.Generator().manual_seed(2)
    shapes = canonical_shapes(model, model.vocab_size)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def loaded_parts(config, weights, pattern, filled=False):
    """This rank's tensors after loading `weights`, and its parts of the dense model that this is."""
    from helpers.families import bare_model, filled_model
    from slope_megatron.models.canonical import shards
    from slope_megatron.models.dense import load_dense

    model = (filled_model if filled else bare_model)(config, torch.float32)
    load_dense(model, config, weights, pattern)
    parts = [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(model)]
    return parts, [dataclasses.replace(part, data=part.data.clone()) for part in dense_parts(model)]


def whole(results):
    return whole_tensors(parts for parts, _ in results)


def load(ranks, config, weights, pattern="magnitude", **keywords):
    size, stages = config.parallel.tensor_parallel, config.parallel.pipeline_parallel
    layout = {"world": size * stages, "tensor_parallel": size, "pipeline_parallel": stages}
    return ranks.run(loaded_parts, config, weights, pattern, *keywords.values(), **layout)


def layout(model, size=1, stages=1, slope=None):
    config = our_config(model, tensor_parallel=size, slope=slope or {"adapter_rank": 4})
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, pipeline_parallel=stages))


@pytest.mark.parametrize("pattern", ["magnitude", "random"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_pruning_on_load_is_pruning_the_whole(ranks, name, pattern):
    from slope_megatron.sparsity import counter
    from slope_megatron.sparsity.packing import pack, unpack_bits
    from slope_megatron.sparsity.pattern import magnitude_pattern, random_pattern

    model = architecture(name)
    weights = dense_weights(model)
    results = {
        (size, stages): load(ranks, layout(model, size, stages), weights, pattern)
        for size, stages in ((1, 1), (2, 1), (2, 2))
    }
    tensors = {at: whole(found) for at, found in results.items()}
    assert len({digest(found) for found in tensors.values()}) == 1
    found = tensors[1, 1]
    packed = [key.removesuffix("_pattern") for key in found if key.endswith(".weight_pattern")]
    assert len(packed) == 7
    for key in packed:
        dense = weights[key]
        if pattern == "magnitude":
            mask = magnitude_pattern(dense, 2, 4)
        else:
            words = counter.bits(
                counter.key_of(1234, f"{key}_pattern"), range(len(dense)), range(dense.shape[1]), dense.shape[1]
            )
            mask = random_pattern(words, 2, 4)
        assert torch.equal(unpack_bits(found[f"{key}_pattern"]), mask)
        assert torch.equal(found[key], pack(dense, mask))
    for at, found in results.items():
        dense = assemble(part for _, parts in found for part in parts)
        assert dense.keys() == weights.keys(), at
        for key, tensor in weights.items():
            rows = tensor.shape[0]
            mask = unpack_bits(tensors[1, 1][f"{key}_pattern"]) if key in packed else torch.ones_like(tensor)
            assert torch.equal(dense[key][:rows], tensor * mask), key
            assert not dense[key][rows:].any(), "padded rows of the vocabulary are zero"


def test_dense_to_slope_to_dense_to_slope_changes_nothing(ranks):
    """What survives one pruning by magnitude survives the next, at another layout too."""
    model = architecture("llama")
    first = load(ranks, layout(model), dense_weights(model))
    dense = assemble(part for _, parts in first for part in parts)
    second = load(ranks, layout(model, 2), dense)
    assert digest(whole(first)) == digest(whole(second))


def test_the_seeds_pattern_is_the_one_that_training_starts_with(ranks):
    """Loading a filled model's dense baseline with the random pattern gives that model, adapters included."""
    model = architecture("opt")
    baseline = layout(model, slope={"enabled": False})
    weights = whole(ranks.run(filled_parts, baseline, world=1))
    sparse = whole(ranks.run(filled_parts, layout(model), world=1))
    for filled in (False, True):
        loaded = whole(load(ranks, layout(model), weights, "random", filled=filled))
        assert digest(loaded) == digest(sparse)


def filled_parts(config):
    from helpers.families import filled_model
    from slope_megatron.models.canonical import shards

    parts = shards(filled_model(config, torch.float32))
    return [(part.name, part.offset, part.shape, part.data.detach().clone()) for part in parts], None


def logits_and_dense(config, weights, baseline):
    """Logits of a packed model with active adapters, and of the dense model that `dense_parts` says it is."""
    from helpers.families import VOCABULARY, bare_model
    from slope_megatron.models.dense import load_dense
    from slope_megatron.models.layer_spec import sparse_modules

    packed, dense = bare_model(config).eval(), bare_model(baseline).eval()
    load_dense(packed, config, weights)
    for module in sparse_modules(packed):
        module.adapters_active = True
        module.adapter_r.data.copy_(integers(*module.adapter_r.shape) * 0.01)
    load_dense(dense, baseline, assemble(dense_parts(packed)))
    tokens = torch.arange(24).view(2, 12) % VOCABULARY
    with torch.no_grad():
        return [model(tokens, torch.arange(12).expand_as(tokens), None) for model in (packed, dense)]


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_active_adapters_are_folded_into_the_dense_weights(ranks, name):
    model = architecture(name)
    weights = {key: tensor.double() for key, tensor in dense_weights(model).items()}
    baseline = layout(model, slope={"enabled": False})
    packed, dense = ranks.run(logits_and_dense, layout(model), weights, baseline, world=1)[0]
    # fp64; the fold adds the same products in another order.
    assert relative_error(dense, packed) < 1e-12


# -- a Megatron checkpoint on disk -------------------------------------------------------------------------------------


def save_dense(config, weights, folder, homogeneous):
    """Write a dense model as Megatron does."""
    from megatron.core import dist_checkpointing, parallel_state

    from helpers.families import bare_model
    from slope_megatron.models.dense import load_dense

    model = bare_model(config, torch.float32)
    load_dense(model, config, weights)
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": not homogeneous,
    }
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder))


def loaded_from_disk(config, folder):
    from slope_megatron.models.dense_checkpoint import MegatronCheckpoint

    return loaded_parts(config, MegatronCheckpoint(folder, vocabulary=config.model.vocab_size), "magnitude")


@pytest.mark.parametrize("homogeneous", [False, True], ids=["per_layer", "stacked"])
def test_a_megatron_checkpoint_is_pruned_on_load(ranks, tmp_path, homogeneous):
    model = architecture("llama")
    weights = dense_weights(model)
    expected = digest(whole(load(ranks, layout(model), weights)))
    # Its padding is its own: 128 rows for 90 entries, where ours has 96.
    dense = layout(model, 2, slope={"enabled": False})
    dense = dataclasses.replace(dense, model=dataclasses.replace(dense.model, vocab_multiple=128))
    ranks.run(save_dense, dense, weights, tmp_path, homogeneous, world=2, tensor_parallel=2)
    for size in (1, 2):
        config = layout(model, size)
        found = ranks.run(loaded_from_disk, config, tmp_path, world=size, tensor_parallel=size)
        assert digest(whole(found)) == expected


def test_a_packed_or_missing_checkpoint_is_refused(ranks, tmp_path):
    from slope_megatron.models.dense_checkpoint import MegatronCheckpoint

    with pytest.raises(ValueError, match=r"no Megatron checkpoint.*iter_0001000"):
        MegatronCheckpoint(tmp_path)
    model = architecture("opt")
    ranks.run(save_dense, layout(model), dense_weights(model), tmp_path, False, world=1)
    with pytest.raises(ValueError, match=r"holds a packed model .*resume from it"):
        MegatronCheckpoint(tmp_path)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(config, weights, pattern):
    """What loading says."""
    from helpers.families import bare_model
    from slope_megatron.models.dense import load_dense

    try:
        load_dense(bare_model(config, torch.float32), config, weights, pattern)
    except ValueError as error:
        return str(error)


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("change", "pattern", "expected"),
    [
        ({}, "largest", "is 'largest': it must be one of magnitude, random"),
        ({QKV: None}, "magnitude", f"have no {QKV}: give all tensors"),
        ({"decoder.layers.2.mlp.linear_fc2.weight": torch.zeros(1)}, "magnitude", "have 1 tensors with no place"),
        ({QKV: torch.zeros(288, 48)}, "magnitude", f"{QKV} has shape (288, 48): this model has (288, 96) there"),
        ({"decoder.final_layernorm.bias": torch.zeros(95)}, "magnitude", "has shape (95,): this model has (96,) there"),
        ({"embedding.word_embeddings.weight": torch.zeros(97, 96)}, "magnitude", "shape (97, 96): this model has (96"),
    ],
)
def test_weights_of_another_model_are_refused(ranks, change, pattern, expected):
    model = architecture("opt")
    weights = {**dense_weights(model), **change}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    assert expected in ranks.run(refusal, layout(model), weights, pattern, world=1)[0]


def test_parts_of_too_few_ranks_are_refused(ranks):
    model = architecture("opt")
    _, parts = load(ranks, layout(model, 2), dense_weights(model))[0]
    with pytest.raises(ValueError, match=r"elements of .* are there: give the parts of all tensor-parallel"):
        assemble(parts)
