"""BERT: the same model at every layout, its blocks' linears sparse, its mask obeyed; test_families has the formula."""

import dataclasses

import pytest
import torch

from helpers.families import VOCABULARY, digest, hf_config, our_config, whole_tensors
from helpers.numerics import relative_error

LENGTH = 12


def config_of(size=1, stages=1, sequence_parallel=False, recompute="none", dropout=0.0):
    from slope_megatron.export.hf_config import model_config

    model = dataclasses.replace(model_config(hf_config("bert")), init_std=0.1, dropout=dropout)
    config = our_config(model, tensor_parallel=size, slope={"adapter_rank": 4})
    parallel = dataclasses.replace(
        config.parallel, pipeline_parallel=stages, sequence_parallel=sequence_parallel, recompute=recompute
    )
    return dataclasses.replace(config, parallel=parallel)


def batch():
    generator = torch.Generator().manual_seed(7)
    tokens, labels = torch.randint(0, VOCABULARY, (2, 3, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    types = (torch.arange(LENGTH) > 5).long().expand_as(tokens)
    return tokens, mask, types, labels


def step(config):
    """This rank's tensors, both losses, and its gradients, in fp64."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from helpers.families import filled_model
    from slope_megatron.models.canonical import shards
    from slope_megatron.models.layer_spec import sparse_modules

    model = filled_model(config)
    parts = [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(model)]
    for module in sparse_modules(model):
        module.adapters_active = True
    for shard in shards(model):
        if shard.name.endswith("adapter_r"):
            # Zero at the start. Equal rows would get no gradient: behind a norm it sums to zero over the outputs.
            rows = torch.arange(shard.offset[0], shard.offset[0] + len(shard.data), dtype=torch.float64)
            shard.data.detach().copy_(0.01 * torch.sin(rows[:, None] + 1.0).expand_as(shard.data))
    tokens, mask, types, labels = batch()
    logits, binary = model(tokens, mask, types)
    # Megatron's own cross-entropy computes in fp32: take the logits and stay in fp64.
    logits = gather_from_tensor_model_parallel_region(logits)
    masked = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    following = torch.nn.functional.cross_entropy(binary, torch.tensor([0, 1, 0]))
    (masked + following).backward()
    parameters = dict(model.named_parameters())
    gradients = []
    for shard in shards(model):
        parameter = parameters.get(shard.local_name)
        if parameter is None:
            continue
        assert parameter.grad is not None, f"{shard.local_name} has no gradient"
        if getattr(parameter, "sequence_parallel", False):
            gradient = parameter.grad.clone()
            torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        else:
            gradient = parameter.grad
        gradients.append((shard.name, shard.offset, shard.shape, gradient.clone()))
    return parts, (masked.item(), following.item()), gradients


def test_the_same_seed_gives_the_same_bert_at_every_layout(ranks):
    expected = ranks.run(step, config_of(), world=1)[0]
    tensors, gradients = whole_tensors([expected[0]]), whole_tensors([expected[2]])
    assert sum(name.endswith(".weight_pattern") for name in tensors) == 7, "two blocks of four, the first linear dense"
    for size, sequence_parallel, recompute in ((2, False, "none"), (2, True, "selective"), (3, True, "full")):
        config = config_of(size, sequence_parallel=sequence_parallel, recompute=recompute)
        results = ranks.run(step, config, world=size, tensor_parallel=size)
        assert digest(whole_tensors(parts for parts, _, _ in results)) == digest(tensors)
        for _, losses, _ in results:
            # fp64; only the order of sums differs (DESIGN section 2).
            assert losses == pytest.approx(expected[1], rel=1e-12)
        found = whole_tensors(gradient for _, _, gradient in results)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert relative_error(found[name], gradient) < 1e-12, name


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_drop_the_same_model(ranks, sequence_parallel):
    """With dropout, tensor-parallel ranks still compute one loss."""
    config = config_of(2, sequence_parallel=sequence_parallel, dropout=0.1)
    first, second = (losses for _, losses, _ in ranks.run(step, config, world=2, tensor_parallel=2))
    without = ranks.run(step, config_of(), world=1)[0][1]
    assert first == second
    assert all(abs(loss - plain) > 1e-3 for loss, plain in zip(first, without, strict=True))


def staged_logits(config):
    """Both logits, on the last of two pipeline stages; None on the first. And this rank's tensors."""
    from megatron.core import parallel_state

    from helpers.families import filled_model
    from slope_megatron.models.canonical import shards

    model = filled_model(config).eval()
    parts = [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(model)]
    tokens, mask, types, _ = batch()
    with torch.no_grad():
        if parallel_state.is_pipeline_last_stage() and not parallel_state.is_pipeline_first_stage():
            received = torch.empty(LENGTH, len(tokens), config.model.hidden_size, dtype=torch.float64)
            torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor([received])
        found = model(tokens, mask, types)
        if not parallel_state.is_pipeline_last_stage():
            torch.distributed.send(found, parallel_state.get_pipeline_model_parallel_next_rank())
            found = None
    return parts, found


def test_two_pipeline_stages_are_the_same_bert(ranks):
    (parts, expected), *_ = ranks.run(staged_logits, config_of(), world=1)
    results = ranks.run(staged_logits, config_of(stages=2), world=2, pipeline_parallel=2)
    assert digest(whole_tensors(found for found, _ in results)) == digest(whole_tensors([parts]))
    assert results[0][1] is None
    for found, whole in zip(results[1][1], expected, strict=True):
        assert torch.equal(found, whole), "the same operations in the same order"


def masked_logits(config):
    """Logits of two batches that differ only where the mask is 0, and those of the second one without its mask."""
    from helpers.families import filled_model

    model = filled_model(config).eval()
    tokens, mask, types, _ = batch()
    other = torch.where(mask.bool(), tokens, (tokens + 1) % VOCABULARY)
    with torch.no_grad():
        return [model(*inputs) for inputs in ((tokens, mask, types), (other, mask, types), (other, None, types))]


def test_what_the_mask_hides_is_not_seen(ranks):
    real = batch()[1].bool()
    first, second, unmasked = ranks.run(masked_logits, config_of(), world=1)[0]
    assert torch.equal(first[0][real], second[0][real]) and torch.equal(first[1], second[1])
    assert relative_error(unmasked[0][1, :8], second[0][1, :8]) > 1e-3


def losses_of(config):
    """Per-token MLM loss of Megatron's cross-entropy, and the same from the logits."""
    from helpers.families import filled_model

    model = filled_model(config, torch.float32).eval()
    tokens, mask, types, labels = batch()
    with torch.no_grad():
        loss, _ = model(tokens, mask, types, labels)
        logits, _ = model(tokens, mask, types)
    return loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def test_labels_give_the_loss_of_each_token(ranks):
    loss, expected = ranks.run(losses_of, config_of(), world=1)[0]
    assert loss.shape == (3, LENGTH)
    # fp32 softmax over 96 entries: a few units in the last place of a loss near 5.
    torch.testing.assert_close(loss.flatten(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "rope"}, "--position is rope with --architecture bert: it must be learned"),
        ({"gated_mlp": True}, "--gated-mlp is True with --architecture bert: it must be False"),
        ({"normalization": "RMSNorm"}, "--normalization is RMSNorm with --architecture bert: it must be LayerNorm"),
        ({"linear_bias": False}, "--linear-bias is False with --architecture bert: it must be True"),
    ],
)
def test_what_bert_has_no_form_for_is_refused(change, message):
    from slope_megatron.models.bert import check_bert

    with pytest.raises(ValueError, match=message):
        check_bert(dataclasses.replace(config_of().model, **change))
