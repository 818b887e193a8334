"""The same seed gives the same model at every layout, and the same function up to the order of sums."""

import hashlib

import pytest
import torch

from helpers.models import VOCABULARY, small_config, step_batches
from helpers.numerics import relative_error


def parts_and_gradients(config, seed):
    """This rank's tensors, loss and gradients in fp64."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from slope_megatron.models.canonical import shards
    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.models.provider import build_model

    model = build_model(config, VOCABULARY, torch.float64)
    for module in sparse_modules(model):
        module.adapters_active = bool(config.slope.adapter_rank)
    parts = [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(model)]
    # R is zero at the start: give it numbers that do not depend on the layout.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter_r"):
                parameter.fill_(0.01)
    batch = step_batches(config, seed, 0, 1)[0]
    # Megatron's own cross-entropy computes in fp32: take the logits and stay in fp64.
    logits = model(batch["tokens"], batch["position_ids"], None)
    logits = gather_from_tensor_model_parallel_region(logits)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    group = parallel_state.get_tensor_model_parallel_group()
    gradients = []
    by_name = dict(model.named_parameters())
    for shard in shards(model):
        parameter = by_name.get(shard.local_name)
        if parameter is None or parameter.grad is None:
            continue
        gradient = parameter.grad.clone()
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(gradient, group=group)
        if gradient.shape == shard.data.shape:
            gradients.append((shard.name, shard.offset, shard.shape, gradient))
    return parts, loss.item(), gradients


def assemble(ranks_parts):
    """Whole tensors from all ranks' parts."""
    whole = {}
    for parts in ranks_parts:
        for name, offset, shape, data in parts:
            target = whole.setdefault(name, torch.zeros(shape, dtype=data.dtype))
            target[tuple(slice(o, o + size) for o, size in zip(offset, data.shape, strict=True))] = data
    return whole


def digest(tensors) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("gated", [False, True], ids=["opt", "llama"])
@pytest.mark.parametrize("pattern", ["random", "magnitude"])
def test_the_same_seed_gives_the_same_model_at_every_layout(ranks, gated, pattern):
    slope = {"adapter_rank": 4, "pattern": pattern}
    expected_parts, expected_loss, gradients = ranks.run(
        parts_and_gradients, small_config(gated=gated, slope=slope), 3, world=1
    )[0]
    expected_gradients = assemble([gradients])
    expected_digest = digest(assemble([expected_parts]))
    for size, sequence_parallel in ((2, False), (2, True), (4, False)):
        config = small_config(gated=gated, slope=slope, tensor_parallel=size, sequence_parallel=sequence_parallel)
        results = ranks.run(parts_and_gradients, config, 3, world=size, tensor_parallel=size)
        assert digest(assemble([parts for parts, _, _ in results])) == expected_digest
        for _, loss, _ in results:
            # fp64; only the order of sums differs (DESIGN section 2).
            assert loss == pytest.approx(expected_loss, rel=1e-12)
        found = assemble([gradient for _, _, gradient in results])
        assert found.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            if gradient.norm() > 1e-9:  # the key biases' gradient is zero but for rounding
                assert relative_error(found[name], gradient) < 1e-12, name


def test_another_seed_gives_another_model(ranks):
    digests = {
        digest(assemble([ranks.run(parts_and_gradients, small_config(seed=seed), 0, world=1)[0][0]])) for seed in (1, 2)
    }
    assert len(digests) == 2


def weights_of(config):
    """`{name: (dense weight, row pattern)}` of the packed linears, or of their dense baselines."""
    from slope_megatron.layers.packed_weight import PackedWeight
    from slope_megatron.models.layer_spec import weights_to_prune
    from slope_megatron.models.provider import build_model

    model = build_model(config, VOCABULARY, torch.float32)
    if not config.slope.enabled:
        pruned = {id(weight) for weight in weights_to_prune(model, config.slope)}
        return {name: (weight.detach(), None) for name, weight in model.named_parameters() if id(weight) in pruned}
    return {
        f"{name}.weight": (module.dense_weight(), module.row_pattern())
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
    }


@pytest.mark.parametrize("rescale", [{}, {"init_rescale": True}, {"mup": True}], ids=lambda slope: "".join(slope))
def test_a_sparse_model_starts_as_its_dense_baseline_pruned(ranks, rescale):
    sparse = ranks.run(weights_of, small_config(slope=rescale), world=1)[0]
    dense = ranks.run(weights_of, small_config(slope={"enabled": False}), world=1)[0]
    assert sparse.keys() == dense.keys()
    assert len(sparse) == 7, "two blocks of four linears, the first linear dense"
    factor = 2.0**0.5 if rescale else 1.0
    for name, (weight, pattern) in sparse.items():
        dense_weight, _ = dense[name]
        assert pattern.double().mean() == 0.5
        torch.testing.assert_close(weight, dense_weight * pattern * factor, rtol=1e-6, atol=0)


def spec_table(slope):
    from slope_megatron.config import SlopeConfig
    from slope_megatron.models.rules import sparse_linears

    return [sorted(sparse_linears(SlopeConfig(**slope), layer)) for layer in (0, 1)]


def differences(config):
    """Tensors, by canonical name, that start otherwise with standards of their own: {name: (ratio, first number)}."""
    from slope_megatron.models.canonical import shards
    from slope_megatron.models.init_weights import init_weights
    from slope_megatron.models.provider import build_bare_model

    model = build_bare_model(config, VOCABULARY, torch.float64)
    common = {"seed": 3, "init_std": 0.02, "num_layers": config.model.num_layers}
    init_weights(model, **common)
    plain = {shard.local_name: shard.data.clone() for shard in shards(model)}
    init_weights(model, **common, embedding_std=0.1, norm_weight=0.0)
    found = {}
    for shard in shards(model):
        before, now = plain[shard.local_name].flatten().double(), shard.data.flatten().double()
        if not torch.equal(before, now):
            ratios = (now / before).unique()
            found[shard.local_name] = (shard.name, ratios.min().item(), ratios.max().item())
    return found


def test_embeddings_and_norms_start_as_the_host_wants_them(ranks):
    """A last stage's tied copy, too; every other tensor as before."""
    first, last = ranks.run(differences, small_config(pipeline_parallel=2), world=2, pipeline_parallel=2)
    found = {**first, **last}
    copies = {name for name, (canonical, *_) in found.items() if canonical == "embedding.word_embeddings.weight"}
    assert copies == {"embedding.word_embeddings.weight", "output_layer.weight"}
    for name, (canonical, low, high) in found.items():
        if name.endswith("norm.weight"):
            assert low == high == 0, name
        else:
            assert "_embeddings.weight" in canonical and low == pytest.approx(5) and high == pytest.approx(5), name
    assert any(name.endswith("norm.weight") for name in found)


def test_which_linears_are_sparse():
    pair, four = ["linear_fc1", "linear_fc2"], ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    assert spec_table({}) == [["linear_fc1", "linear_fc2", "linear_proj"], four]
    assert spec_table({"dense_first_linear": False}) == [four, four]
    assert spec_table({"sparse_attention": False}) == [pair, pair]
    assert spec_table({"sparse_mlp": False}) == [["linear_proj"], ["linear_proj", "linear_qkv"]]
    assert spec_table({"enabled": False}) == [[], []]
