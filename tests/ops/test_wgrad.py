"""wgrad of `full` mode: the sparse product, its choice, and that its mean is the dense gradient."""

import pytest
import torch

from helpers.numerics import relative_error
from helpers.packed import packed_weight
from slope_megatron.linear import slope_linear
from slope_megatron.ops import mvue, reference, wgrad
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.ops.cusparselt import CusparseltOperands
from slope_megatron.sparsity.packing import pack
from slope_megatron.sparsity.token_draws import TokenDraws, as_int32, stream_table

DTYPE = torch.bfloat16


def draws_of(rows, device, seed=0):
    streams = stream_table([(11, 12)], [range(rows)])
    return TokenDraws(as_int32([seed, 99]).to(device), streams.to(device), 2, 4)


def problem(tokens, rows, columns, device, dtype=DTYPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, rows, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    return dy.to(device), x.to(device)


def operands_of(weight, **more):
    return CusparseltOperands(weight.values, weight.row_bits, weight.column_bits, **more)


@pytest.mark.parametrize("tokens", [64, 40, 7])
def test_the_sparse_product_is_that_of_the_estimate(tokens, device, fresh_choices):
    """Against fp64: no further off than twice the dense product of the same matrices, which rounds as often."""
    dy, x = problem(tokens, 64, 128, device)
    draws = draws_of(64, device)
    found = wgrad.product(dy, x, draws, dense_allowed=False)
    estimate = draws.estimate(dy)
    assert not torch.equal(estimate, dy)
    exact = estimate.double().t() @ x.double()
    assert relative_error(found, exact) <= 2 * relative_error(estimate.t() @ x, exact)


def test_a_dense_choice_multiplies_the_gradient_itself(device, fresh_choices, caplog):
    dy, x = problem(64, 64, 128, device)
    with caplog.at_level("INFO"):
        fresh_choices.record(Key("wgrad", 64, 128, 64, DTYPE), Choice(False, sparse_ms=2.0, dense_ms=1.0))
    assert caplog.messages == [
        "wgrad 64x128 T64 bfloat16: dense (2:4 2.000 ms, dense 1.000 ms); the exact gradient, unpruned"
    ]
    found = wgrad.product(dy, x, draws_of(64, device), dense_allowed=True)
    assert torch.equal(found, dy.t() @ x)


def test_operands_read_the_estimate_in_wgrad_alone(device, fresh_choices):
    weight = packed_weight(64, 128, DTYPE, device)
    ours, theirs = operands_of(weight, dense_allowed=False), reference.build(weight.values, weight.row, weight.column)
    dy, x = problem(64, 64, 128, device)
    draws, results = draws_of(64, device), []
    for operands in (ours, theirs):
        leaf, values = x.clone().requires_grad_(), weight.values.clone().requires_grad_()
        slope_linear(leaf, values, operands, draws=draws).backward(dy)
        results.append((leaf.grad, values.grad))
    (dx, dw), (expected_dx, expected_dw) = results
    assert relative_error(dx, expected_dx) < 1e-2 and relative_error(dw, expected_dw) < 1e-2
    exact = pack(dy.t() @ x, weight.row)
    assert relative_error(dw, exact) > 0.1, "the estimate is not the gradient"


@pytest.mark.gpu
def test_a_layout_that_is_not_known_is_dense_or_refused(device, fresh_choices, monkeypatch):
    dy, x = problem(64, 64, 128, device)
    monkeypatch.setattr(wgrad.layout, "probe", lambda *_: wgrad.layout.Layout(False))
    with pytest.raises(ValueError, match=r"written in sm_90's layout and cuda:0 has another; use --slope-backend auto"):
        wgrad.product(dy, x, draws_of(64, device), dense_allowed=False)
    assert torch.equal(wgrad.product(dy, x, draws_of(64, device), dense_allowed=True), dy.t() @ x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(2048, 1024, 512), (1000, 320, 2048), (777, 512, 192)])
def test_random_products_are_as_near_fp64_as_dense_ones(tokens, rows, columns, dtype, device, fresh_choices):
    dy, x = problem(tokens, rows, columns, device, dtype)
    draws = draws_of(rows, device)
    found = wgrad.product(dy, x, draws, dense_allowed=False)
    estimate = draws.estimate(dy)
    exact = estimate.double().t() @ x.double()
    assert relative_error(found, exact) <= 2 * relative_error(estimate.t() @ x, exact)


@pytest.mark.gpu
def test_the_mean_over_draws_is_the_dense_gradient(device, fresh_choices):
    """400 micro-batches with one dY: z-scores of the mean, and the same key gives the same bits."""
    dy, x = problem(256, 256, 256, device)
    draws, samples = draws_of(256, device), []
    for micro_batch in range(400):
        draws.key.copy_(as_int32([micro_batch, 7]))
        samples.append(wgrad.product(dy, x, draws, dense_allowed=False))
    again = wgrad.product(dy, x, draws, dense_allowed=False)
    assert torch.equal(again, samples[-1]) and not torch.equal(samples[0], samples[1])
    samples = torch.stack(samples).double()
    z = (samples.mean(0) - dy.double().t() @ x.double()) / (samples.std(0) / len(samples) ** 0.5)
    # 65,536 scores, rounding of each product to bf16 included: the largest of so many normals is near 4.5.
    assert float(z.abs().max()) < 6.0 and 0.9 < float(z.square().mean()) < 1.1
    assert abs(float(z.mean())) < 0.05


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_for_each_key(device, fresh_choices):
    dy, x = problem(512, 256, 128, device)
    draws = draws_of(256, device)
    with pytest.raises(RuntimeError, match="run it once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wgrad.product(dy, x, draws, dense_allowed=False)
    wgrad.product(dy, x, draws, dense_allowed=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = wgrad.product(dy, x, draws, dense_allowed=False)
    for seed in (5, 6):
        draws.key.copy_(as_int32([seed, 1]))
        graph.replay()
        assert torch.equal(found, wgrad.product(dy, x, draws, dense_allowed=False))


@pytest.mark.gpu
def test_a_step_does_not_synchronize(device, fresh_choices):
    from slope_megatron.layers.draws import Draws, RowDraws

    dy, x = problem(512, 256, 128, device)
    draws = Draws(3)
    rows = RowDraws(draws, ("weight",), (range(256),))
    wgrad.product(dy, x, rows.present(2, 4, device), dense_allowed=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for draws.micro_batch in range(3):
            wgrad.product(dy, x, rows.present(2, 4, device), dense_allowed=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_measured_choices(device, fresh_choices):
    """A large product is worth pruning for; one that is all pruning is not."""
    large = wgrad._choose(Key("wgrad", 4096, 4096, 4096, DTYPE), device, True)
    small = wgrad._choose(Key("wgrad", 8192, 64, 8192, DTYPE), device, True)
    assert large.sparse and large.algorithm is not None and large.sparse_ms < large.dense_ms
    assert not small.sparse and small.dense_ms < small.sparse_ms


def test_operand_and_product_are_registered(device):
    dy, x = problem(40, 64, 128, device)
    draws = draws_of(64, device)
    arguments = (dy, draws.key, draws.streams)
    torch.library.opcheck(torch.ops.slope.mvue_operand.default, arguments)
    operand = mvue.mvue_operand(*arguments)
    torch.library.opcheck(torch.ops.slope.sparse_wgrad.default, (operand, x, 64))
