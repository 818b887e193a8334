"""`full` mode in a layer: wgrad reads the unbiased estimate, keyed to the micro-batch; nothing else changes."""

import pytest
import torch

from helpers.numerics import integers
from slope_megatron.sparsity import counter
from slope_megatron.sparsity.mvue import mvue
from slope_megatron.sparsity.mvue_rng import ROUNDS

IN, OUT, TOKENS, SEED = 64, 32, 12, 3
NAME = "decoder.layers.0.mlp.linear_fc1.weight"


def build(mode, state=None, token_groups="batch"):
    """This rank's part of a column-parallel layer whose rows are two parts, as gate and up are."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slope_megatron.config import SlopeConfig
    from slope_megatron.layers.column_parallel import SlopeColumnParallelLinear
    from slope_megatron.layers.packed_weight import Region
    from slope_megatron.layers.random_streams import RowStreams

    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=IN,
        num_attention_heads=4,
        tensor_model_parallel_size=size,
        params_dtype=torch.float64,
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    slope = SlopeConfig(mode=mode, token_groups=token_groups)
    layer = SlopeColumnParallelLinear(IN, OUT, slope=slope, config=config, init_method=None, bias=False)
    half = OUT // 2 // size
    parts = [range(start + rank * half, start + (rank + 1) * half) for start in (0, OUT // 2)]
    for index, rows in enumerate(parts):
        local = range(index * half, (index + 1) * half)
        layer.init_weight(SEED, Region(NAME, local, rows.start, 0, IN), std=1.0)
    layer.update_column_pattern()
    if state:
        layer.row_streams = RowStreams(state, (NAME, NAME), tuple(parts))
    return layer, [row for rows in parts for row in rows]


def gradients(mode, step=0, micro_batch=0, samples=1, token_groups="batch"):
    """`(dX, dW, W^R's kept positions, rows)` of this rank for small whole numbers."""
    from slope_megatron.layers.random_streams import RngState

    state = RngState(SEED)
    layer, rows = build(mode, state, token_groups)
    state.step, state.micro_batch = step, micro_batch
    x = integers(TOKENS, IN, seed=1).view(-1, samples, IN).requires_grad_()
    dy = integers(TOKENS, OUT, seed=2).view(-1, samples, OUT)[..., rows]
    layer(x)[0].backward(dy)
    return x.grad, layer.weight.grad, layer.row_pattern(), rows


def estimate(dy_TN, step, micro_batch):
    """The estimate of the whole dY, each word asked for by its own index."""
    key, stream = counter.key_of(SEED, f"mvue:{step}:{micro_batch}"), counter.key_of(SEED, NAME)
    groups = TOKENS // 4
    words = torch.zeros(OUT, groups, dtype=torch.int64)
    for row in range(OUT):
        for group in range(groups):
            index = row * groups + group
            words[row, group] = counter.philox(key, torch.tensor(index // 4), stream, ROUNDS)[index % 4]
    return mvue(dy_TN.t(), words, 2, 4).t()


@pytest.mark.parametrize("size", [1, 2])
def test_wgrad_reads_the_estimate_and_dgrad_does_not(ranks, size):
    from slope_megatron.sparsity.packing import pack

    x, dy = integers(TOKENS, IN, seed=1), integers(TOKENS, OUT, seed=2)
    paper = ranks.run(gradients, "paper", world=size, tensor_parallel=size)
    for step, micro_batch in ((0, 0), (0, 1), (5, 0)):
        expected = estimate(dy, step, micro_batch).t() @ x
        found = ranks.run(gradients, "full", step, micro_batch, world=size, tensor_parallel=size)
        for (dx, dw, mask, rows), (paper_dx, paper_dw, *_) in zip(found, paper, strict=True):
            assert torch.equal(dx, paper_dx)
            # Estimates are fractions: their sums are rounded.
            assert torch.allclose(dw, pack(expected[rows], mask), rtol=1e-12, atol=1e-12)
            assert not torch.equal(dw, paper_dw)
    assert not torch.equal(estimate(dy, 0, 0), estimate(dy, 0, 1))
    assert not torch.equal(estimate(dy, 0, 0), estimate(dy, 5, 0))


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (3, 1), (3, 2)])
def test_groups_may_be_adjacent_tokens_of_one_sample(ranks, samples, size):
    from slope_megatron.sparsity.packing import pack

    x, dy = integers(TOKENS, IN, seed=1), integers(TOKENS, OUT, seed=2)
    order = torch.arange(TOKENS).view(-1, samples).t().flatten()
    expected = estimate(dy[order], 0, 0).t() @ x[order]
    layout = {"world": size, "tensor_parallel": size}
    found = ranks.run(gradients, "full", 0, 0, samples, "sequence", **layout)
    paper = ranks.run(gradients, "paper", 0, 0, samples, "sequence", **layout)
    as_they_lie = ranks.run(gradients, "full", 0, 0, samples, **layout)
    for (dx, dw, mask, rows), (paper_dx, *_), (_, other, *_) in zip(found, paper, as_they_lie, strict=True):
        assert torch.equal(dx, paper_dx)
        assert torch.allclose(dw, pack(expected[rows], mask), rtol=1e-12, atol=1e-12)
        assert torch.equal(dw, other) == (samples == 1)


def many_gradients(count):
    """dW of many micro-batches, all with the same dY, and `paper`'s."""
    found = [gradients("full", 0, micro_batch)[1] for micro_batch in range(count)]
    return torch.stack(found), gradients("paper")[1]


def test_the_mean_over_micro_batches_is_the_dense_gradient(ranks):
    samples, expected = ranks.run(many_gradients, 150, world=1)[0]
    spread = samples.std(0) / len(samples) ** 0.5
    random = spread > 0
    assert float(random.double().mean()) > 0.9
    z = (samples.mean(0) - expected)[random] / spread[random]
    # 1,024 scores: normal up to the few draws; one above 6 once in 500,000 tests. Their square is 1 in the mean.
    assert float(z.abs().max()) < 6.0 and 0.8 < float(z.square().mean()) < 1.3


def places_under_recomputation():
    """Two micro-batches go forward before the first goes backward, as in a pipeline; which draws each backward sees."""
    from torch.utils.checkpoint import checkpoint

    from slope_megatron.layers.random_streams import RngState

    state, seen = RngState(SEED), []
    layer, _ = build("full", state)

    def block(x):
        seen.append(state.micro_batch)
        return layer(x)[0]

    outputs = []
    for state.micro_batch in range(3):
        x = integers(TOKENS, 1, IN, seed=1).requires_grad_()
        outputs.append(state.follow(checkpoint(block, x, use_reentrant=True).sum()))
    gradients_found = []
    for output in outputs:
        layer.weight.grad = None
        output.backward()
        gradients_found.append(layer.weight.grad.clone())
    return seen, [not torch.equal(gradients_found[0], other) for other in gradients_found[1:]]


def test_recomputation_finds_its_micro_batch(ranks):
    seen, differ = ranks.run(places_under_recomputation, world=1)[0]
    assert seen == [0, 1, 2, 0, 1, 2] and all(differ)


def without_streams():
    layer, _ = build("full")
    x = torch.randn(4, 1, IN, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
    try:
        layer(x)
    except RuntimeError as error:
        return str(error)


def test_a_model_without_streams_says_so(ranks):
    assert (
        "call slope_megatron.models.random_streams.attach_random_streams on the built model"
        in ranks.run(without_streams, world=1)[0]
    )
