"""The backend's operands against the reference backend; on a CPU the ops' plain-torch kernels stand in."""

import pytest
import torch

from helpers.known_layout import skip_without_known_metadata
from helpers.numerics import relative_error, whole_numbers
from helpers.packed import packed_weight
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.ops.operands import patterns, reference
from slope_megatron.ops.operands.cusparselt import unsupported_weight
from slope_megatron.ops.operands.packed import PackedOperands
from slope_megatron.sparsity.operand import backward_slots, slot_indices
from slope_megatron.sparsity.packing import pack, pack_bits, unpack
from slope_megatron.sparsity.pattern import column_pattern

DTYPE = torch.bfloat16


def both(device, rows=128, columns=192, seed=0, dtype=DTYPE):
    weight = packed_weight(rows, columns, dtype, device, seed=seed, whole_numbers=True)
    ours = PackedOperands(weight.values, weight.row_bits, weight.column_bits, dense_allowed=False)
    return weight, ours, reference.build(weight.values, weight.row_bits, weight.column_bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_equal_the_reference_s(device, dtype, fresh_choices):
    """Whole numbers whose sums stay under 256: exact in either backend."""
    _, ours, theirs = both(device, dtype=dtype)
    x = whole_numbers(48, 192, device=device, dtype=dtype)
    dy = whole_numbers(48, 128, device=device, dtype=dtype)
    assert torch.equal(ours.forward(x), theirs.forward(x))
    assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))
    assert torch.equal(ours.wgrad(dy, x), theirs.wgrad(dy, x))


@pytest.mark.parametrize("dense", [False, True])
def test_operands_for_some_products_alone(device, dense, fresh_choices):
    """As ZeRO-3 builds them for each use: what is not asked for takes no memory."""
    for kind, shape in (("forward", (128, 192)), ("dgrad", (192, 128))):
        fresh_choices.record(Key(Product(kind), *shape, 48, DTYPE), Choice(not dense))
    weight, _, theirs = both(device)
    arguments = (weight.values, weight.row_bits, weight.column_bits)
    x, dy = whole_numbers(48, 192, device=device), whole_numbers(48, 128, device=device)
    forward = PackedOperands(*arguments, products_wanted=(Product.FORWARD,))
    assert list(forward.sparse) == [Product.FORWARD] and torch.equal(forward.forward(x), theirs.forward(x))
    backward = PackedOperands(*arguments, products_wanted=(Product.DGRAD, Product.WGRAD))
    assert list(backward.sparse) == [Product.DGRAD]
    assert torch.equal(backward.dgrad(dy), theirs.dgrad(dy))
    assert torch.equal(backward.wgrad(dy, x), theirs.wgrad(dy, x))
    wgrad = PackedOperands(*arguments, products_wanted=(Product.WGRAD,))
    assert torch.equal(wgrad.wgrad(dy, x), theirs.wgrad(dy, x))
    if not dense:
        with pytest.raises(RuntimeError, match="these operands hold nothing for dgrad: build them with it"):
            forward.dgrad(dy)


def test_a_pattern_is_looked_at_once_and_again_when_it_changes(device, monkeypatch):
    weight = packed_weight(128, 192, DTYPE, device)
    looks = []
    monkeypatch.setattr(torch, "isin", lambda *arguments, isin=torch.isin: looks.append(1) or isin(*arguments))
    assert patterns.is_two_of_four(weight.row_bits) and patterns.is_two_of_four(weight.row_bits)
    assert len(looks) == 1
    weight.row_bits[0, 0] = 7
    assert not patterns.is_two_of_four(weight.row_bits)


@pytest.mark.parametrize("kind", ["forward", "dgrad"])
def test_a_dense_choice_gives_the_same_products_and_follows_refreshes(device, kind, fresh_choices):
    weight, ours, theirs = both(device)
    shape = (128, 192) if kind == "forward" else (192, 128)
    fresh_choices.record(Key(Product(kind), *shape, 48, DTYPE), Choice(False))
    operand = whole_numbers(48, shape[1], device=device)
    assert torch.equal(getattr(ours, kind)(operand), getattr(theirs, kind)(operand))
    for operands in (ours, theirs):
        operands.refresh(weight.values * 2)
    assert torch.equal(getattr(ours, kind)(operand), getattr(theirs, kind)(operand))


@pytest.mark.parametrize("kind", ["forward", "dgrad"])
def test_a_tiled_choice_cuts_the_operand_and_follows_refreshes(device, kind, fresh_choices):
    weight, ours, theirs = both(device)
    shape = (128, 192) if kind == "forward" else (192, 128)
    fresh_choices.record(Key(Product(kind), *shape, 48, DTYPE), Choice(True, tiles=shape[0] // 64))
    operand = whole_numbers(48, shape[1], device=device)
    assert torch.equal(getattr(ours, kind)(operand), getattr(theirs, kind)(operand))
    for operands in (ours, theirs):
        operands.refresh(-weight.values)
    assert torch.equal(getattr(ours, kind)(operand), getattr(theirs, kind)(operand))


def test_a_new_column_pattern_rewrites_the_backward_operand_alone(device, fresh_choices):
    weight, ours, theirs = both(device)
    other = packed_weight(128, 192, DTYPE, device, seed=0)
    column = packed_weight(128, 192, DTYPE, device, seed=0).column
    assert not torch.equal(column, weight.column)
    assert torch.equal(other.row, weight.row)
    before = ours.sparse[Product.FORWARD].buffer.clone()
    for operands in (ours, theirs):
        operands.set_column_pattern(pack_bits(column), weight.values)
    assert torch.equal(ours.sparse[Product.FORWARD].buffer, before)
    dy = whole_numbers(48, 128, device=device)
    assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))


def test_reasons_for_refusing_a_weight():
    weight = packed_weight(64, 64, torch.bfloat16, "cpu")
    assert unsupported_weight(weight.values, weight.row_bits) == "the weight is on cpu"


@pytest.mark.gpu
def test_reasons_for_refusing_a_weight_on_the_gpu(device):
    weight = packed_weight(64, 64, torch.float32, device)
    assert "float32" in unsupported_weight(weight.values, weight.row_bits)
    odd = packed_weight(96, 64, torch.bfloat16, device)
    assert "multiples of 64" in unsupported_weight(odd.values, odd.row_bits)
    weight = packed_weight(64, 64, torch.bfloat16, device)
    assert "not 2:4" in unsupported_weight(weight.values, torch.full_like(weight.row_bits, 0b00010111))
    assert unsupported_weight(weight.values, weight.row_bits) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(2048, 1024, 512), (320, 4096, 1000), (1536, 512, 777)])
def test_random_products_are_as_near_fp64_as_dense_ones(rows, columns, tokens, dtype, device, fresh_choices):
    """The bound is twice the dense product's own error: both round fp32 sums once to 16 bits."""
    weight = packed_weight(rows, columns, dtype, device)
    ours = PackedOperands(weight.values, weight.row_bits, weight.column_bits, dense_allowed=False)
    for kind, dense, width in (("forward", weight.dense().t(), columns), ("dgrad", weight.doubly_pruned(), rows)):
        x = torch.randn(tokens, width, device=device).to(dtype)
        exact = x.double() @ dense.double()
        bound = 2 * relative_error(x @ dense, exact)
        assert relative_error(getattr(ours, kind)(x), exact) <= bound


@pytest.fixture
def unknown_layout(monkeypatch):
    """As on an architecture whose metadata our kernels do not know: the library's compressor writes it."""
    monkeypatch.setattr(layout, "probe", lambda device, dtype: layout.Layout(known_metadata=False))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(128, 192), (1536, 512)])
def test_an_unknown_metadata_layout(rows, columns, dtype, unknown_layout, device, fresh_choices):
    """Operands built, refreshed, pruned anew and measured without a kernel that writes metadata."""
    weight, ours, theirs = both(device, rows, columns, dtype=dtype)
    x = whole_numbers(48, columns, device=device, dtype=dtype)
    dy = whole_numbers(48, rows, device=device, dtype=dtype)

    def same():
        return torch.equal(ours.forward(x), theirs.forward(x)) and torch.equal(ours.dgrad(dy), theirs.dgrad(dy))

    assert same()
    assert [operand.tiles for operand in ours.sparse.values()] == [1, 1]
    for operands in (ours, theirs):
        operands.refresh(-weight.values)
    assert same()
    generator = torch.Generator().manual_seed(7)
    score = torch.rand(weight.values.shape, generator=generator).to(device)
    column = pack(column_pattern(unpack(score, weight.row), weight.row, 2, 4), weight.row)
    assert not torch.equal(column, weight.column)
    for operands in (ours, theirs):
        operands.set_column_pattern(pack_bits(column), weight.values)
    assert same()


@pytest.mark.gpu
def test_the_library_s_metadata_is_what_our_kernels_write(device):
    """On an architecture whose layout is known: both ways to the same bytes."""
    skip_without_known_metadata(device)
    weight = packed_weight(192, 320, DTYPE, device)
    indices = slot_indices(weight.row)
    assert torch.equal(layout.library_metadata(indices, DTYPE), products.row_metadata(weight.row_bits))
    _, indices = backward_slots(weight.values, weight.row, weight.column)
    written = products.column_metadata(weight.row_bits, weight.column_bits)
    assert torch.equal(layout.library_metadata(indices, DTYPE), written)
