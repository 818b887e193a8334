"""wgrad of `full` mode: the sparse products, their choice, and that their mean is the dense gradient."""

import dataclasses

import pytest
import torch

from helpers.known_layout import skip_without_known_metadata
from helpers.numerics import relative_error
from helpers.packed import packed_weight
from helpers.wgrad import DTYPE, is_near_fp64, problem, rng_of
from slope_megatron.linear import slope_linear
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import layout, mvue
from slope_megatron.ops.operands import cutlass, reference, wgrad
from slope_megatron.ops.operands.packed import PackedOperands
from slope_megatron.sparsity.mvue_rng import as_int32
from slope_megatron.sparsity.packing import pack, unpack_bits


@pytest.fixture(params=["cusparselt", "cutlass"])
def by_name(request, device):
    """Whose sparse product it is, asked for by name; on a CPU each op's plain-torch reference stands in."""
    if device.type == "cuda" and request.param == "cutlass" and cutlass.unsupported():
        pytest.skip(cutlass.unsupported())
    if request.param == "cusparselt":
        skip_without_known_metadata(device)
    return {"among": (request.param,), "dense_allowed": False}


@pytest.mark.parametrize("tokens", [64, 40, 7])
def test_the_sparse_product_is_that_of_the_estimate(tokens, by_name, device, fresh_choices):
    dy, x, row_bits = problem(tokens, 64, 128, device)
    rng = rng_of(64, device)
    found = wgrad.packed(dy, x, row_bits, rng, **by_name)
    assert is_near_fp64(found, dy, x, row_bits, rng)


def test_a_dense_choice_multiplies_the_gradient_itself(device, fresh_choices, caplog):
    dy, x, row_bits = problem(64, 64, 128, device)
    with caplog.at_level("INFO"):
        fresh_choices.record(Key(Product.WGRAD, 64, 128, 64, DTYPE), Choice(False, sparse_ms=2.0, dense_ms=1.0))
    assert caplog.messages == [
        "wgrad 64x128 T64 bfloat16: dense (2:4 2.000 ms, dense 1.000 ms); the exact gradient, unpruned"
    ]
    found = wgrad.packed(dy, x, row_bits, rng_of(64, device))
    assert torch.equal(found, pack(dy.t() @ x, unpack_bits(row_bits)))


def test_wgrad_tries_both_libraries_whatever_other_tokens_chose(fresh_choices):
    """Its operand is written anew for each product: nothing has a form to keep."""
    key = Key(Product.WGRAD, 128, 192, 48, DTYPE)
    fresh_choices.record(key, Choice(True))
    assert measure.libraries_for(dataclasses.replace(key, tokens=96)) == ("cusparselt", "cutlass")


@pytest.mark.parametrize("library", ["cusparselt", "cutlass"])
def test_operands_read_the_estimate_in_wgrad_alone(library, kernels_here, fresh_choices):
    weight = packed_weight(64, 128, DTYPE, kernels_here)
    ours = PackedOperands(weight.values, weight.row_bits, weight.column_bits, library=library)
    if kernels_here.type == "cuda":
        # Of these small products a dense one may be the fastest.
        fresh_choices.record(Key(Product.WGRAD, 64, 128, 64, DTYPE), Choice(True))
    theirs = reference.build(weight.values, weight.row_bits, weight.column_bits)
    dy, x, _ = problem(64, 64, 128, kernels_here)
    rng, results = rng_of(64, kernels_here), []
    for operands in (ours, theirs):
        leaf, values = x.clone().requires_grad_(), weight.values.clone().requires_grad_()
        slope_linear(leaf, values, operands, rng=rng).backward(dy)
        results.append((leaf.grad, values.grad))
    (dx, dw), (expected_dx, expected_dw) = results
    assert relative_error(dx, expected_dx) < 1e-2 and relative_error(dw, expected_dw) < 1e-2
    exact = pack(dy.t() @ x, weight.row)
    assert relative_error(dw, exact) > 0.1, "the estimate is not the gradient"


@pytest.mark.gpu
def test_a_layout_that_is_not_known_is_dense_or_refused(device, fresh_choices, monkeypatch):
    dy, x, row_bits = problem(64, 64, 128, device)
    rng = rng_of(64, device)
    monkeypatch.setattr(layout, "probe", lambda *_: layout.Layout(False))
    with pytest.raises(ValueError, match=r"written in sm_90's layout and cuda:0 has another; use --slope-backend auto"):
        wgrad.packed(dy, x, row_bits, rng, dense_allowed=False, among=("cusparselt",))
    monkeypatch.setattr(cutlass, "packing_kernels", lambda dtype: ())
    assert torch.equal(wgrad.packed(dy, x, row_bits, rng), pack(dy.t() @ x, unpack_bits(row_bits)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(2048, 1024, 512), (1000, 320, 2048), (777, 512, 192)])
def test_random_products_are_as_near_fp64_as_dense_ones(
    tokens, rows, columns, dtype, by_name, device, fresh_choices
):  # fmt: skip
    dy, x, row_bits = problem(tokens, rows, columns, device, dtype)
    rng = rng_of(rows, device)
    assert is_near_fp64(wgrad.packed(dy, x, row_bits, rng, **by_name), dy, x, row_bits, rng)


@pytest.mark.gpu
def test_the_mean_over_draws_is_the_dense_gradient(by_name, device, fresh_choices):
    """400 micro-batches with one dY: z-scores of the mean, and the same key gives the same bits."""
    dy, x, row_bits = problem(256, 256, 512, device)
    rng, samples = rng_of(256, device), []
    for micro_batch in range(400):
        rng.key.copy_(as_int32([micro_batch, 7]))
        samples.append(wgrad.packed(dy, x, row_bits, rng, **by_name))
    again = wgrad.packed(dy, x, row_bits, rng, **by_name)
    assert torch.equal(again, samples[-1]) and not torch.equal(samples[0], samples[1])
    samples = torch.stack(samples).double()
    exact = pack(dy.double().t() @ x.double(), unpack_bits(row_bits))
    z = (samples.mean(0) - exact) / (samples.std(0) / len(samples) ** 0.5)
    # 65,536 scores, rounding of each product to bf16 included: the largest of so many normals is near 4.5.
    assert float(z.abs().max()) < 6.0 and 0.9 < float(z.square().mean()) < 1.1
    assert abs(float(z.mean())) < 0.05


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_for_each_key(by_name, device, fresh_choices):
    dy, x, row_bits = problem(512, 256, 128, device)
    rng = rng_of(256, device)
    with pytest.raises(RuntimeError, match="run it once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wgrad.packed(dy, x, row_bits, rng, **by_name)
    wgrad.packed(dy, x, row_bits, rng, **by_name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = wgrad.packed(dy, x, row_bits, rng, **by_name)
    for seed in (5, 6):
        rng.key.copy_(as_int32([seed, 1]))
        graph.replay()
        assert torch.equal(found, wgrad.packed(dy, x, row_bits, rng, **by_name))


@pytest.mark.gpu
def test_a_step_does_not_synchronize(by_name, device, fresh_choices):
    from slope_megatron.layers.random_streams import RngState, RowStreams

    dy, x, row_bits = problem(512, 256, 128, device)
    state = RngState(3)
    rows = RowStreams(state, ("weight",), (range(256),))
    wgrad.packed(dy, x, row_bits, rows.rng(2, 4, device), **by_name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for state.micro_batch in range(3):
            wgrad.packed(dy, x, row_bits, rows.rng(2, 4, device), **by_name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_measured_choices(device, fresh_choices):
    """A large product is worth pruning for; one that is all pruning is not."""
    skip_without_known_metadata(device)
    allowed = {"dense_allowed": True, "among": tuple(wgrad.LIBRARIES)}
    large = wgrad._measure(Key(Product.WGRAD, 4096, 4096, 4096, DTYPE), device, **allowed)
    small = wgrad._measure(Key(Product.WGRAD, 8192, 64, 8192, DTYPE), device, **allowed)
    assert large.sparse and large.algorithm is not None and large.sparse_ms < large.dense_ms
    assert not small.sparse and small.dense_ms < small.sparse_ms


@pytest.mark.gpu
def test_measuring_leaves_the_random_numbers_as_they_were(device, fresh_choices):
    """Only one rank measures, and only a first start: dropout masks drawn afterwards must not depend on it."""
    dy, x, row_bits = problem(256, 256, 128, device)
    before = torch.cuda.get_rng_state(device), torch.get_rng_state()
    wgrad.packed(dy, x, row_bits, rng_of(256, device))
    assert fresh_choices.find(Key(Product.WGRAD, 256, 128, 256, dy.dtype)) is not None
    assert torch.equal(torch.cuda.get_rng_state(device), before[0]) and torch.equal(torch.get_rng_state(), before[1])


def test_operand_and_products_are_registered(kernels_here):
    dy, x, row_bits = problem(40, 64, 128, kernels_here)
    rng = rng_of(64, kernels_here)
    for for_cutlass in (False, True):
        arguments = (dy, rng.key, rng.streams, for_cutlass)
        torch.library.opcheck(torch.ops.slope.mvue_operand.default, arguments)
        operand = mvue.mvue_operand(*arguments)
        if for_cutlass:
            torch.library.opcheck(torch.ops.slope.packed_wgrad.default, (operand, x, row_bits))
        else:
            torch.library.opcheck(torch.ops.slope.sparse_wgrad.default, (operand, x, 64))
