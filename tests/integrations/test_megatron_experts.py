"""A mixture of experts through the Megatron-LM plugin: one model at every layout of experts and tensor parallelism."""

import logging

import pytest
import torch

from helpers.experts import (
    BLOCKS,
    Layout,
    build,
    forward_backward,
    in_data_parallel,
    metadata,
    start,
    tensors,
    together,
    transformer_config,
)

SHARED = {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True}
LAYOUTS = [
    Layout(expert=2),
    Layout(expert=2, dispatcher="allgather"),
    Layout(tensor=2, expert=2),
    Layout(tensor=2, expert=2, expert_tensor=1),
]


def slope_config(**settings):
    from slope_megatron.config import SlopeConfig

    return SlopeConfig(backend="reference", **settings)


def first_step(layout, settings, rank=0):
    """The model, and after one forward and backward its gradients and loss."""
    from slope_megatron.integrations.megatron_lm.adapters import use_adapters

    start(layout)
    model = build(layout, slope_config(adapter_rank=rank), **settings)
    before = tensors(model)
    use_adapters([model], bool(rank))
    ddp = in_data_parallel(model)
    loss = forward_backward(ddp, 0)
    return loss, before, tensors(model, lambda parameter: parameter.main_grad)


@pytest.fixture(scope="module")
def of_one_rank(ranks):
    ((loss, weights, gradients),) = ranks.run(first_step, Layout(), SHARED, 4, world=1)
    return loss, together([weights]), together([gradients])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_gradients_and_loss_are_those_of_one_rank(ranks, of_one_rank, layout):
    """Patterns and weights to the bit: they are drawn by the expert's number in the whole model."""
    results = ranks.run(first_step, layout, SHARED, 4, world=layout.world)
    loss, weights, gradients = of_one_rank
    assert [found for found, *_ in results] == pytest.approx([loss] * layout.world, rel=1e-6)
    found = together([parts for _, parts, _ in results])
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    for name, gradient in together([parts for _, _, parts in results]).items():
        # Sums over ranks are made in another order.
        torch.testing.assert_close(
            gradient, gradients[name], rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_shared_experts_beside_the_dispatch_are_the_same(ranks, of_one_rank):
    layout, overlapped = Layout(tensor=2, expert=2), {**SHARED, "moe_shared_expert_overlap": True}
    results = ranks.run(first_step, layout, overlapped, 4, world=layout.world)
    assert [found for found, *_ in results] == pytest.approx([of_one_rank[0]] * layout.world, rel=1e-6)
    for name, gradient in together([parts for _, _, parts in results]).items():
        torch.testing.assert_close(gradient, of_one_rank[2][name], rtol=1e-4, atol=1e-7)


def test_experts_and_shared_experts_are_packed_and_the_router_is_dense(ranks, of_one_rank):
    _, weights, gradients = of_one_rank
    block = "decoder.layers.1.mlp"
    for expert in range(4):
        fc1 = f"{block}.experts.experts.{expert}.linear_fc1.weight"
        assert weights[fc1].shape == (192, 32) and weights[f"{fc1}_pattern"].shape == (192, 8)
        assert gradients[fc1].any(), "each expert has tokens in this batch"
    assert weights[f"{block}.shared_experts.linear_fc2.weight"].shape == (64, 32)
    assert weights[f"{block}.router.weight"].shape == (4, 64)
    patterns = [weights[f"{block}.experts.experts.{expert}.linear_fc1.weight_pattern"] for expert in range(4)]
    assert not torch.equal(patterns[0], patterns[1])


def only_first_experts(layout):
    """Two steps in which all tokens go to experts 0 and 1: at EP 2, rank 1 has none. Rows that its products saw."""
    from slope_megatron.layers.packed_weight import PackedWeight

    start(layout)
    settings = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    model = build(layout, slope_config(), **settings)
    for layer in model.decoder.layers:
        layer.mlp.router.expert_bias.copy_(torch.tensor([100.0, 100.0, 0.0, 0.0]))
    ddp, rows = in_data_parallel(model), set()
    multiply = PackedWeight._multiply

    def observed(self, x, *arguments):
        if self.is_expert:
            rows.add(x.shape[0])
        return multiply(self, x, *arguments)

    PackedWeight._multiply = observed
    losses = [forward_backward(ddp, step) for step in range(2)]
    return losses, rows, tensors(model, lambda parameter: parameter.main_grad)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_rank_whose_experts_get_no_token_goes_on(ranks, dispatcher):
    ((losses, _, gradients),) = ranks.run(only_first_experts, Layout(), world=1)
    first, second = ranks.run(only_first_experts, Layout(expert=2, dispatcher=dispatcher), world=2)
    assert first[0] == pytest.approx(losses, rel=1e-6) and second[0] == pytest.approx(losses, rel=1e-6)
    assert second[1] == {16}, "the smallest bucket of zeros"
    expected, found = together([gradients]), together([first[2], second[2]])
    assert not found["decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight"].any()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def save(layout, folder):
    """Core's distributed checkpoint of a model of seed 1, as Megatron-LM writes it; what is in it."""
    from megatron.core import dist_checkpointing

    start(layout)
    model = build(layout, slope_config(adapter_rank=4), **SHARED)
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata()), str(folder))
    return tensors(model)


def load(layout, folder):
    """The same into a model of another seed."""
    from megatron.core import dist_checkpointing

    start(layout)
    model = build(layout, slope_config(adapter_rank=4), seed=2, **SHARED)
    state = dist_checkpointing.load(model.sharded_state_dict(metadata=metadata()), str(folder))
    model.load_state_dict(state)
    return tensors(model)


def test_a_checkpoint_is_read_at_another_layout(ranks, tmp_path):
    wrote, reads = Layout(tensor=2, expert=2), Layout(expert=2)
    expected = together(ranks.run(save, wrote, tmp_path, world=wrote.world))
    found = together(ranks.run(load, reads, tmp_path, world=reads.world))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def spec_of_grouped_experts():
    """Stock spec of grouped experts, as `--slope` makes it: kinds of experts and their linears, and what was said."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from slope_megatron.integrations.megatron_lm.specs import sparse_block_spec

    start(Layout())
    said = logging.Handler()
    said.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("slope_megatron").addHandler(said)
    config, messages = transformer_config(Layout()), []
    config.moe_grouped_gemm = True  # its own check wants another machine
    stock = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    experts = [
        layer.submodules.mlp.submodules.experts
        for layer in sparse_block_spec(stock, slope_config(), config).layer_specs
    ]
    kinds = [(expert.module.__name__, expert.submodules.linear_fc1.__name__) for expert in experts]
    return kinds, messages


def test_grouped_experts_become_sequential_ones_and_it_is_said(ranks):
    ((kinds, messages),) = ranks.run(spec_of_grouped_experts, world=1)
    assert kinds == [("SequentialMLP", "SlopeColumnParallelLinear")] * BLOCKS
    assert sum("run one after another" in text for text in messages) == 1


def refused(layout):
    start(layout)
    try:
        build(layout, slope_config())
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_gradients_that_megatron_would_lose_are_refused(ranks):
    """At EP 1 it sums them over data-parallel ranks alone, and experts that are whole on each of two TP ranks see
    halves of the tokens."""
    layout = Layout(tensor=2, expert_tensor=1)
    assert set(ranks.run(refused, layout, world=2)) == {
        "--expert-tensor-parallel-size is 1 and --tensor-model-parallel-size 2 without expert parallelism: Megatron "
        "would not add up the gradients of experts over tensor-parallel ranks; give --expert-model-parallel-size, or "
        "equal sizes"
    }
