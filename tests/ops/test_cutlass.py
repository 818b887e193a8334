"""The `cutlass` backend against the reference; on a CPU the op's plain-torch reference stands in for the kernels."""

import argparse
import dataclasses

import pytest
import torch

from helpers.numerics import relative_error, whole_numbers
from helpers.packed import packed_weight
from slope_kernels import cutlass as kernels
from slope_megatron.linear import slope_linear
from slope_megatron.ops import choices
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.operands import cutlass as cutlass_library
from slope_megatron.ops.operands import reference
from slope_megatron.ops.operands.cutlass import row_metadata, unsupported_weight
from slope_megatron.ops.operands.packed import PackedOperands
from slope_megatron.sparsity.packing import pack_bits

DTYPE = torch.bfloat16
SHAPES = [(64, 64, 16), (128, 192, 48), (192, 320, 7)]


def both(device, rows=128, columns=192, dtype=DTYPE):
    weight = packed_weight(rows, columns, dtype, device, whole_numbers=True)
    ours = PackedOperands(weight.values, weight.row_bits, weight.column_bits, library="cutlass", dense_allowed=False)
    return weight, ours, reference.build(weight.values, weight.row_bits, weight.column_bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
def test_products_equal_the_reference_s(rows, columns, tokens, dtype, kernels_here, fresh_choices):
    """Whole numbers whose sums stay under 256: exact in either backend."""
    _, ours, theirs = both(kernels_here, rows, columns, dtype)
    x = whole_numbers(tokens, columns, device=kernels_here, dtype=dtype)
    dy = whole_numbers(tokens, rows, device=kernels_here, dtype=dtype)
    assert torch.equal(ours.forward(x), theirs.forward(x))
    assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))
    assert torch.equal(ours.wgrad(dy, x), theirs.wgrad(dy, x))


def test_epilogues_add_a_bias_and_a_source(kernels_here, fresh_choices):
    _, ours, theirs = both(kernels_here)
    x = whole_numbers(48, 192, device=kernels_here)
    bias, source = whole_numbers(128, device=kernels_here), whole_numbers(48, 128, device=kernels_here)
    exact = theirs.forward(x)
    # One kernel for all three, not as many libraries as kernels may win.
    fresh_choices.record(Key(Product.FORWARD, 128, 192, 48, DTYPE), Choice(True, algorithm=kernels.DEFAULT))
    assert torch.equal(ours.with_bias(bias).forward(x), exact + bias)
    assert torch.equal(ours.add(Product.FORWARD, x, source.clone()), exact + source)
    assert torch.equal(ours.add(Product.FORWARD, x, source.clone(), bias), exact + source + bias)
    operand = ours.sparse[Product.FORWARD]
    found = cutlass_library.cutlass_mm(operand.values_RC, operand.metadata, x, bias)
    assert torch.equal(found, exact + bias)
    dy, source = whole_numbers(48, 128, device=kernels_here), whole_numbers(48, 192, device=kernels_here)
    fresh_choices.record(Key(Product.DGRAD, 192, 128, 48, DTYPE), Choice(True, algorithm=kernels.DEFAULT))
    assert torch.equal(ours.add(Product.DGRAD, dy, source.clone()), theirs.dgrad(dy) + source)


def test_the_forward_product_reads_the_parameter_itself(kernels_here, fresh_choices):
    """No copy: a value written in place counts at once, and one that has moved after `rebind`."""
    weight, ours, theirs = both(kernels_here)
    x = whole_numbers(48, 192, device=kernels_here)
    weight.values.mul_(-1)
    theirs.refresh(weight.values)
    assert torch.equal(ours.forward(x), theirs.forward(x))
    moved = weight.values.clone()
    ours.rebind(moved)
    weight.values.zero_()
    assert torch.equal(ours.forward(x), theirs.forward(x))


@pytest.mark.gpu
def test_a_parameter_off_the_line_is_copied_and_said_once(kernels_here, fresh_choices, caplog):
    """The plain-torch reference of a CPU reads any address."""
    weight, ours, theirs = both(kernels_here)
    flat = torch.zeros(weight.values.numel() + 1, dtype=DTYPE, device=kernels_here)
    ours.rebind(flat[1:].view_as(weight.values).copy_(weight.values))
    x = whole_numbers(48, 192, device=kernels_here)
    cutlass_library._say_copied.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert torch.equal(ours.forward(x), theirs.forward(x))
    assert sum("does not start on a line of 16 bytes" in message for message in caplog.messages) == 1


def test_a_new_column_pattern_and_a_refresh_reach_the_backward_operand(kernels_here, fresh_choices):
    weight, ours, theirs = both(kernels_here)
    column = packed_weight(128, 192, DTYPE, kernels_here).column
    assert not torch.equal(column, weight.column)
    dy = whole_numbers(48, 128, device=kernels_here)
    for operands in (ours, theirs):
        operands.set_column_pattern(pack_bits(column), weight.values)
    assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))
    for operands in (ours, theirs):
        operands.refresh(-weight.values)
    assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))


def test_forward_alone_keeps_metadata_alone(kernels_here, fresh_choices):
    weight, _, theirs = both(kernels_here, 128, 256)
    ours = PackedOperands(
        weight.values,
        weight.row_bits,
        None,
        library="cutlass",
        dense_allowed=False,
        products_wanted=(Product.FORWARD,),
    )
    x = whole_numbers(48, 256, device=kernels_here)
    assert torch.equal(ours.forward(x), theirs.forward(x))
    assert (ours.patterns.row_bits, ours.patterns.column_bits, list(ours.sparse)) == (None, None, [Product.FORWARD])
    assert ours.sparse[Product.FORWARD].values_RC is weight.values
    assert ours.sparse[Product.FORWARD].metadata.nbytes == 128 * 256 // 8


@pytest.mark.slow
def test_torch_compile_sees_one_graph(kernels_here, fresh_choices):
    weight, ours, _ = both(kernels_here)
    values = weight.values.clone().requires_grad_()
    x = whole_numbers(48, 192, device=kernels_here).requires_grad_()

    def layer(x, values):
        return slope_linear(torch.relu(x), values, ours) * 2

    def gradients(function):
        x.grad = values.grad = None
        y = function(x, values)
        y.sum().backward()
        return y.detach(), x.grad.clone(), values.grad.clone()

    eager = gradients(layer)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(found, expected) for found, expected in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("kind", ["forward", "dgrad"])
def test_an_operand_takes_the_form_of_the_library_that_wins(kind, kernels_here, fresh_choices):
    weight, _, theirs = both(kernels_here)
    operands = PackedOperands(weight.values, weight.row_bits, weight.column_bits)
    shape = (128, 192) if kind == "forward" else (192, 128)
    fresh_choices.record(Key(Product(kind), *shape, 48, DTYPE), Choice(True, algorithm=kernels.DEFAULT))
    x = whole_numbers(48, shape[1], device=kernels_here)
    assert torch.equal(getattr(operands, kind)(x), getattr(theirs, kind)(x))
    values = (-weight.values).clone()
    column = packed_weight(128, 192, DTYPE, kernels_here).column
    for each in (operands, theirs):
        each.set_column_pattern(pack_bits(column), values)
    assert torch.equal(getattr(operands, kind)(x), getattr(theirs, kind)(x))
    operand = operands.sparse[Product(kind)]
    assert operand.library == "cutlass"
    assert operand.values_RC is values if kind == "forward" else operand.values_RC.nbytes == 128 * 192


def test_a_shape_keeps_its_library_for_other_numbers_of_tokens(fresh_choices):
    from slope_megatron.ops.autotune import measure

    key = Key(Product.FORWARD, 128, 192, 48, DTYPE)
    other = dataclasses.replace(key, tokens=96)
    assert measure.libraries_for(other) == ("cusparselt", "cutlass")
    fresh_choices.record(key, Choice(True, algorithm=kernels.DEFAULT))
    assert measure.libraries_for(other) == ("cutlass",)
    fresh_choices.record(key, Choice(True))
    assert measure.libraries_for(other) == ("cusparselt",)


def test_a_saved_choice_of_a_kernel_comes_back(fresh_choices, tmp_path):
    key = Key(Product.FORWARD, 128, 192, 48, DTYPE)
    choice = Choice(True, 1, dataclasses.replace(kernels.DEFAULT, swizzle=4, raster=2), 0.5, 0.75)
    fresh_choices.record(key, choice)
    fresh_choices.save(tmp_path / "choices.json")
    fresh_choices.clear()
    assert fresh_choices.load(tmp_path / "choices.json")
    assert fresh_choices.find(key) == choice
    assert choices.algorithm("cutlass", (False, 128, 192, 48, DTYPE)) == choice.algorithm
    assert str(choice) == "2:4, CUTLASS 128x256x64 2x1 cooperative, tile scheduler 4/2 (2:4 0.500 ms, dense 0.750 ms)"


def test_reasons_for_refusing_a_weight():
    weight = packed_weight(64, 64, DTYPE, "cpu")
    assert unsupported_weight(weight.values, weight.row_bits) == "the weight is on cpu"
    assert "float32" in kernels.unsupported_shape(64, 64, torch.float32)
    assert "multiples of 64" in kernels.unsupported_shape(96, 64, DTYPE)


def test_opcheck(kernels_here):
    weight = packed_weight(64, 128, DTYPE, kernels_here)
    metadata = row_metadata(weight.row_bits)
    x = torch.randn(33, 128, device=kernels_here).to(DTYPE)
    bias, y = x.new_ones(64), x.new_ones(33, 64)
    for added in (None, bias):
        torch.library.opcheck(torch.ops.slope.cutlass_mm.default, (weight.values, metadata, x, added))
    torch.library.opcheck(torch.ops.slope.cutlass_mm_add_.default, (y, weight.values, metadata, x, bias))


@pytest.mark.gpu
def test_cutlass_s_own_word_on_the_metadata(kernels_here):
    """The order that our kernels write is the layout type that its kernels read by."""
    from slope_megatron.sparsity.operand import slot_indices
    from slope_megatron.sparsity.operand_cutlass import metadata_cutlass

    for name in cutlass_library.kernels(DTYPE):
        for rows, columns in ((192, 320), (256, 512)):
            weight = packed_weight(rows, columns, DTYPE, "cpu")
            indices, metadata = slot_indices(weight.row), metadata_cutlass(slot_indices(weight.row))
            nibbles = torch.stack((metadata & 15, metadata >> 4), -1).flatten()
            at = kernels.metadata_positions(name, DTYPE, rows, columns)
            assert torch.equal(nibbles[at], (indices[..., 0] | indices[..., 1] << 2).to(torch.uint8)), name


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(2048, 1024, 512), (320, 4096, 1000), (1536, 576, 777)])
def test_every_kernel_is_as_near_fp64_as_dense_products(rows, columns, tokens, kernels_here):
    """The bound is twice the dense product's own error: both round fp32 sums once to 16 bits."""
    weight = packed_weight(rows, columns, DTYPE, kernels_here)
    metadata = row_metadata(weight.row_bits)
    x = torch.randn(tokens, columns, device=kernels_here).to(DTYPE)
    bias = torch.randn(rows, device=kernels_here).to(DTYPE)
    exact = x.double() @ weight.dense().double().t()
    bound = 2 * relative_error(x @ weight.dense().t(), exact)
    for name in cutlass_library.kernels(DTYPE):
        for scheduler in ((1, 0), (8, 1), (2, 2)):
            y = torch.full((tokens, rows), float("nan"), dtype=DTYPE, device=kernels_here)
            kernels.run(kernels.Algorithm(name, *scheduler), weight.values, metadata, x, y)
            assert relative_error(y, exact) <= bound, (name, scheduler)
            kernels.run(kernels.Algorithm(name, *scheduler), weight.values, metadata, x, y, bias_R=bias)
            assert relative_error(y, exact + bias.double()) <= bound, (name, scheduler)


@pytest.mark.gpu
def test_a_source_may_be_the_output(kernels_here):
    """Y += X W^T in place, a large C beside small products: fp32 until the one rounding."""
    weight = packed_weight(512, 256, DTYPE, kernels_here)
    metadata = row_metadata(weight.row_bits)
    x = torch.randn(300, 256, device=kernels_here).to(DTYPE)
    y = 100 * torch.randn(300, 512, device=kernels_here).to(DTYPE)
    exact = y.double() + x.double() @ weight.dense().double().t()
    kernels.run(kernels.DEFAULT, weight.values, metadata, x, y, source_TR=y)
    assert relative_error(y, exact) <= 2 * relative_error(exact.to(DTYPE), exact)


def test_a_refusal_says_what_was_refused_and_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: argparse.Namespace(cuda_stream=7))
    texts = {1: b"invalid value"}.__getitem__
    streams = []
    kernels.enqueue(lambda _, stream: streams.append(stream), kernels.Arguments(), 0, texts, "the product 64 x 64")
    assert streams == [7]
    with pytest.raises(RuntimeError, match="CUTLASS refused the product 64 x 64: invalid value"):
        kernels.enqueue(lambda *_: 1, kernels.Arguments(), 0, texts, "the product 64 x 64")
