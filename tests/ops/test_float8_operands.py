"""Operands in e4m3 against the emulation; on a CPU the ops' plain-torch kernels stand in for the GPU's."""

import pytest
import torch

from helpers.numerics import relative_error, whole_numbers
from helpers.packed import packed_weight
from slope_megatron.linear import slope_linear
from slope_megatron.ops import backend
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import float8 as float8_products
from slope_megatron.ops.custom_ops import layout
from slope_megatron.ops.operands.float8 import EmulatedFloat8Operands, Float8Operands
from slope_megatron.sparsity import float8
from slope_megatron.sparsity.float8 import E4M3
from slope_megatron.sparsity.operand import indices_e4m3, metadata_e4m3, metadata_sm90, scatter_slots, slot_indices
from slope_megatron.sparsity.packing import pack_bits

DTYPE = torch.bfloat16
ALL = ("forward", "dgrad", "wgrad")


def both(device, rows=128, columns=192, seed=0, dtype=DTYPE, wgrad=True, dense=False):
    """A weight of whole numbers, our operands and the emulated ones."""
    weight = packed_weight(rows, columns, dtype, device, seed=seed, whole_numbers=True)
    ours = Float8Operands(weight.values, weight.row_bits, weight.column_bits, wgrad=wgrad, dense_allowed=dense)
    theirs = EmulatedFloat8Operands(weight.row, dtype, ALL, wgrad=wgrad)
    theirs.set_column_pattern(weight.column_bits, weight.values)
    return weight, ours, theirs


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 192)])
def test_indices_survive_the_metadata_layout(rows, columns):
    weight = packed_weight(rows, columns, torch.float32, "cpu")
    indices = slot_indices(weight.row)
    metadata = metadata_e4m3(metadata_sm90(indices), rows, columns // 4)
    assert torch.equal(indices_e4m3(metadata, rows, columns // 4), indices)


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("tokens", [48, 7])
def test_quantize(tokens, rows, columns, device):
    x = torch.randn(192, tokens, device=device).to(DTYPE).t()
    q, transposed, scale = float8_products.quantize(x, rows, columns)
    expected, expected_scale = float8.quantize(x)
    assert torch.equal(scale[0], expected_scale)
    if rows:
        assert q.shape[0] % 16 == 0
        assert torch.equal(q[:tokens], expected.view(torch.uint8))
        assert not q[tokens:].any()
    if columns:
        assert torch.equal(transposed[:, :tokens], expected.view(torch.uint8).t())
        assert not transposed[:, tokens:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wgrad", [True, False])
@pytest.mark.parametrize("tokens", [48, 23])
def test_products_equal_the_emulated_ones(tokens, wgrad, dtype, device, fresh_choices):
    _, ours, theirs = both(device, dtype=dtype, wgrad=wgrad)
    x = whole_numbers(tokens, 192, device=device, dtype=dtype)
    dy = whole_numbers(tokens, 128, device=device, dtype=dtype)
    bias = whole_numbers(128, device=device, dtype=dtype)
    assert torch.equal(ours.forward(x), theirs.forward(x))
    assert torch.equal(ours.with_bias(bias).forward(x), theirs.forward(x) + bias)
    assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))
    assert torch.equal(ours.wgrad(dy, x), theirs.wgrad(dy, x))


@pytest.mark.parametrize("kind", ["forward", "dgrad"])
@pytest.mark.parametrize("allowed", [True, False])
def test_a_dense_choice_gives_the_same_products_and_follows_refreshes(kind, allowed, device, fresh_choices):
    """Where it is not allowed, as with a backend asked for by name, the 2:4 kernel runs instead."""
    weight, ours, theirs = both(device, dense=allowed)
    shape = (128, 192) if kind == "forward" else (192, 128)
    fresh_choices.record(Key(Product(kind), *shape, 48, E4M3), Choice(False))
    operand = whole_numbers(48, shape[1], device=device)
    assert torch.equal(getattr(ours, kind)(operand), getattr(theirs, kind)(operand))
    assert list(ours.dense) == ([kind] if allowed else [])
    for operands in (ours, theirs):
        operands.refresh(weight.values * 2)
    assert torch.equal(getattr(ours, kind)(operand), getattr(theirs, kind)(operand))


def test_a_new_column_pattern_rewrites_the_backward_operand_alone(device, fresh_choices):
    weight, ours, theirs = both(device)
    # Values are dropped from another position in each group of four that loses some.
    column = packed_weight(128, 192, DTYPE, device, seed=0).column
    assert not torch.equal(column, weight.column)
    before = ours.sparse["forward"].buffer.clone()
    for operands in (ours, theirs):
        operands.set_column_pattern(pack_bits(column), weight.values)
    assert torch.equal(ours.sparse["forward"].buffer, before)
    dy = whole_numbers(48, 128, device=device)
    assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))


def test_the_transposed_gradient_is_shared_and_does_not_outlive_the_gradient(device, fresh_choices):
    _, ours, theirs = both(device)
    x, dy = whole_numbers(48, 192, device=device), whole_numbers(48, 128, device=device)
    ours.dgrad(dy)
    assert len(ours._transposed) == 1
    assert torch.equal(ours.wgrad(dy, x), theirs.wgrad(dy, x))
    assert len(ours._transposed) == 0
    ours.dgrad(dy)
    dy.neg_()
    assert torch.equal(ours.wgrad(dy, x), theirs.wgrad(dy, x)), "written in between"
    ours.dgrad(dy)
    del dy
    assert len(ours._transposed) == 0


def test_wgrad_reads_what_forward_has_rounded(device, fresh_choices):
    """X itself is not kept: its rounded transpose is, in half of the bytes; nothing is kept without a backward."""
    weight = packed_weight(64, 128, torch.bfloat16, device)
    operands = Float8Operands(weight.values, weight.row_bits, weight.column_bits, wgrad=True)
    values = weight.values.clone().requires_grad_()
    x = torch.randn(48, 128, device=device).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = slope_linear(x, values, operands)
    assert [tensor.dtype for tensor in kept if tensor.shape == (128, 48)] == [torch.uint8]
    assert not any(tensor.shape == x.shape for tensor in kept) and not operands._rounded
    dy = torch.randn_like(y)
    y.backward(dy)
    aim = operands.scale, operands.targets[Product.FORWARD]
    expected = operands.wgrad_of_rounded(dy, *float8_products.quantize(x.detach(), False, True, *aim)[1:])
    assert torch.equal(values.grad, expected) and torch.equal(x.grad, operands.dgrad(dy))
    assert torch.equal(y.detach(), operands.forward(x.detach()))
    with torch.no_grad():
        slope_linear(x, values, operands)
    assert not operands._rounded


def test_a_refresh_asks_for_nothing_that_a_cuda_graph_cannot_capture(device, fresh_choices):
    """A mask as an index counts its places on the host, and waits for the device to do so."""
    from torch.utils._python_dispatch import TorchDispatchMode

    weight, ours, _ = both(device, dense=True)
    for product in (Product.FORWARD, Product.DGRAD):
        ours.dense[product] = ours.dense_copy(product)
    asked = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            asked.append((str(function), [a.dtype for a in arguments if isinstance(a, torch.Tensor)]))
            return function(*arguments, **(keywords or {}))

    values = weight.values * 2
    for product in ours.dense:
        with Listen():
            ours.dense[product].refresh()
    assert asked and not any("nonzero" in name or "index" in name or "masked" in name for name, _ in asked), asked
    ours.refresh(values)
    for product, dense in ours.dense.items():
        expected = scatter_slots(
            layout.values_of(dense.operand.buffer, dense.operand.rows, dense.operand.columns, 1, E4M3)[0],
            ours.patterns.indices(product),
        )
        assert torch.equal(dense.matrix_RS.view(torch.uint8), expected.view(torch.uint8))


def test_torch_compile_sees_one_graph(device, fresh_choices):
    weight, operands, _ = both(device)
    values = weight.values.clone().requires_grad_()
    x = whole_numbers(48, 192, device=device).requires_grad_()

    def gradients(function):
        x.grad = values.grad = None
        y = function(x, values)
        y.sum().backward()
        return y.detach(), x.grad.clone(), values.grad.clone()

    layer = lambda x, values: slope_linear(torch.relu(x), values, operands) * 2  # noqa: E731
    eager = gradients(layer)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(found, expected) for found, expected in zip(compiled, eager, strict=True))


def test_an_overflow_stays_visible(device, fresh_choices):
    _, ours, theirs = both(device)
    dy = whole_numbers(48, 128, device=device)
    dy[3, 5] = float("inf")
    x = whole_numbers(48, 192, device=device)
    for operands in (ours, theirs):
        assert operands.dgrad(dy).isnan().all()
        assert operands.wgrad(dy, x).isnan().all()


def op_arguments(device):
    """One call of each op."""
    weight, ours, _ = both(device, 64, 128)
    x = torch.randn(20, 128, device=device).to(DTYPE)
    q, _, scale = float8_products.quantize(x, True, False)
    bias = torch.randn(64, device=device).to(DTYPE)
    forward, backward = (operand.buffer for operand in ours.sparse.values())
    return {
        "quantize_e4m3": (x, True, True, scale, -20),
        "sparse_mm_e4m3": (forward, ours.scale, q, scale, 64, bias, DTYPE, -18),
        "refresh_e4m3_": (weight.values, weight.row_bits, weight.column_bits, forward, backward, ours.scale),
    }


@pytest.mark.parametrize("name", ["quantize_e4m3", "sparse_mm_e4m3", "refresh_e4m3_"])
def test_opcheck(name, device):
    torch.library.opcheck(getattr(torch.ops.slope, name).default, op_arguments(device)[name])


def test_where_it_runs(device, caplog, monkeypatch):
    backend._say_once.cache_clear()
    weight = packed_weight(64, 64, DTYPE, device)
    with caplog.at_level("INFO"):
        built = [
            backend.build_operands(name, weight.values, weight.row_bits, weight.column_bits, float8_kinds=ALL)
            for name in ("auto", "reference")
        ]
    assert isinstance(built[0], Float8Operands if device.type == "cuda" else EmulatedFloat8Operands)
    assert isinstance(built[1], EmulatedFloat8Operands)
    assert any("e4m3 is emulated" in message for message in caplog.messages)


@pytest.mark.gpu
def test_a_gpu_that_cannot_is_refused_with_the_reason(device, monkeypatch):
    weight = packed_weight(96, 64, DTYPE, device)
    arguments = (weight.values, weight.row_bits, weight.column_bits)
    with pytest.raises(ValueError, match=r"--slope-fp8 cannot run here: the weight is 96 x 64 .*; use --slope-fp8 off"):
        backend.build_operands("auto", *arguments, float8_kinds=ALL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(ValueError, match="cannot run here: sm_80 has no e4m3 units; they came with sm_89"):
        backend.build_operands("auto", *arguments, float8_kinds=ALL)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(2048, 1024, 512), (320, 4096, 1000), (1536, 512, 777)])
def test_random_products_are_as_near_fp64_as_dense_ones(rows, columns, tokens, dtype, device, fresh_choices):
    """Rounding to e4m3 is the same to the bit; the bound is twice the error of the dense e4m3 product's own sums."""
    weight = packed_weight(rows, columns, dtype, device)
    ours = Float8Operands(weight.values, weight.row_bits, weight.column_bits, wgrad=True, dense_allowed=False)
    scale = float8.scale_of(weight.values.abs().amax())
    for kind, dense in (("forward", weight.dense()), ("dgrad", weight.doubly_pruned().t().contiguous())):
        x = torch.randn(tokens, dense.shape[1], device=device).to(dtype)
        w = float8.quantize(dense, scale)[0]
        q, _, q_scale = float8_products.quantize(x, True, False)
        exact = float8.rounded(x).double() @ w.double().t() * scale.double()
        theirs = float8_products.dense_mm(q, w, q_scale, scale[None], None, dtype)[:tokens]
        assert relative_error(getattr(ours, kind)(x), exact) <= 2 * relative_error(theirs, exact)


@pytest.mark.gpu
def test_inputs_that_leave_the_aim_are_scaled_by_a_second_pass(device, fresh_choices):
    """bf16 products aim at their first input's scale; whatever comes later, the result is the same."""
    weight, ours, theirs = both(device)
    x, dy = whole_numbers(48, 192, device=device), whole_numbers(48, 128, device=device)
    for factor in (1.0, 2.0**3, 2.0**-3, 2.0**40, 2.0**-40, 0.0):
        assert torch.equal(ours.forward(x * factor), theirs.forward(x * factor))
        assert torch.equal(ours.dgrad(dy * factor), theirs.dgrad(dy * factor))
    assert ours._aimed == {"forward", "dgrad"}
    ours.set_column_pattern(weight.column_bits, weight.values)
    assert not ours._aimed


@pytest.mark.gpu
def test_an_input_that_is_not_finite_is_not_aimed_at(device, fresh_choices):
    """It would leave the product with a second pass until the next column pattern."""
    _, ours, theirs = both(device)
    x = whole_numbers(48, 192, device=device)
    spoiled = x.clone()
    spoiled[3, 5] = float("nan")
    safe = ours.targets["forward"]
    assert torch.isnan(ours.forward(spoiled)).any()
    assert ours.targets["forward"] == safe and not ours._aimed
    assert torch.equal(ours.forward(x), theirs.forward(x))
    assert ours.targets["forward"] != safe and ours._aimed == {"forward"}
