"""The registered ops: schemas, fakes and derivatives (opcheck), and each against plain torch."""

import pytest
import torch

from helpers.packed import packed_weight
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.sparsity.operand import indices_sm90, metadata_sm90, scatter_slots, slot_indices, slots
from slope_megatron.sparsity.packing import unpack

SHAPES = [(64, 64), (128, 192)]


def operand_of(weight, device, dtype):
    """The forward operand of a packed weight, written by the ops."""
    rows, columns = weight.row.shape
    buffer = torch.full((layout.operand_bytes(rows, columns),), 0xAB, dtype=torch.uint8, device=device)
    layout.values_of(buffer, rows, columns, 1, dtype).copy_(weight.values[None])
    layout.metadata_of(buffer, rows, columns, 1).copy_(products.row_metadata(weight.row_bits)[None])
    return buffer


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_indices_survive_the_metadata_layout(rows, columns):
    weight = packed_weight(rows, columns, torch.float32, "cpu")
    indices = slot_indices(weight.row)
    assert torch.equal(indices_sm90(metadata_sm90(indices), rows, columns // 4), indices)


def test_slots_stand_for_the_same_matrix_even_where_fewer_than_two_survive():
    generator = torch.Generator().manual_seed(0)
    alive = torch.rand(64, 64, generator=generator) < 0.3
    alive &= alive.view(64, 16, 4).cumsum(-1).view(64, 64) <= 2
    dense = torch.randn(64, 64, generator=generator)
    values, indices = slots(dense, alive)
    assert torch.equal(scatter_slots(values, indices), dense * alive)
    assert (indices[..., 0] < indices[..., 1]).all()


@pytest.mark.parametrize("tokens", [16, 40, 7])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_sparse_mm_of_whole_numbers_is_exact(rows, columns, tokens, device):
    dtype = torch.bfloat16
    weight = packed_weight(rows, columns, dtype, device, seed=tokens, whole_numbers=True)
    x = torch.randint(-2, 3, (tokens, columns), device=device).to(dtype)
    bias = torch.randint(-2, 3, (rows,), device=device).to(dtype)
    operand = operand_of(weight, device, dtype)
    # Sums stay under 256 in magnitude, the last whole number that bf16 holds without gaps.
    exact = x.double() @ weight.dense().double().t()
    assert exact.abs().max() < 254
    assert torch.equal(products.sparse_mm(operand, x, rows, 1, None).double(), exact)
    biased = products.sparse_mm(operand, x, rows, 1, bias)
    assert torch.equal(biased.double(), exact + bias.double())


@pytest.mark.parametrize("tokens", [16, 7])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_adding_to_what_is_there_is_exact(tokens, tiles, biased, device):
    rows, columns, dtype = 128, 192, torch.bfloat16
    weight = packed_weight(rows, columns, dtype, device, whole_numbers=True)
    operand = layout.retile(operand_of(weight, device, dtype), rows, columns, 1, tiles)
    x = torch.randint(-1, 2, (tokens, columns), device=device).to(dtype)
    y = torch.randint(-9, 10, (tokens, rows), device=device).to(dtype)
    bias = torch.randint(-2, 3, (rows,), device=device).to(dtype) if biased else None
    exact = y.double() + x.double() @ weight.dense().double().t() + (bias.double() if biased else 0)
    assert exact.abs().max() < 254
    products.sparse_mm_add_(y, operand, x, tiles, bias)
    assert torch.equal(y.double(), exact)


@pytest.mark.parametrize("tiles", [2, 3])
def test_tiles_change_nothing(tiles, device):
    rows, columns, dtype = 192, 64, torch.bfloat16
    rows = 64 * tiles
    weight = packed_weight(rows, columns, dtype, device, whole_numbers=True)
    x = torch.randint(-2, 3, (32, columns), device=device).to(dtype)
    whole = operand_of(weight, device, dtype)
    cut = layout.retile(whole, rows, columns, 1, tiles)
    assert torch.equal(layout.retile(cut, rows, columns, tiles, 1), whole)
    bias = torch.randint(-2, 3, (rows,), device=device).to(dtype)
    assert torch.equal(products.sparse_mm(cut, x, rows, tiles, bias), products.sparse_mm(whole, x, rows, 1, bias))


def test_values_on_an_odd_address(device):
    """A flat buffer of an optimizer may put a parameter two bytes off a word."""
    dtype = torch.bfloat16
    weight = packed_weight(64, 128, dtype, device)
    flat = torch.zeros(1 + weight.values.numel(), dtype=dtype, device=device)
    shifted = flat[1:].view_as(weight.values)
    shifted.copy_(weight.values)
    assert torch.equal(products.unpack_kept(shifted, weight.row_bits), weight.dense())
    assert torch.equal(products.choose_column(shifted, weight.row_bits), weight.column_bits)


def test_gather_and_unpack_are_each_other_s_derivative(device):
    weight = packed_weight(64, 64, torch.bfloat16, device)
    dense = torch.randn(64, 64, device=device).to(torch.bfloat16).requires_grad_()
    packed = products.gather_kept(dense, weight.row_bits)
    packed.backward(weight.values)
    assert torch.equal(dense.grad, unpack(weight.values, weight.row))
    values = weight.values.clone().requires_grad_()
    products.unpack_kept(values, weight.row_bits).backward(dense.detach())
    assert torch.equal(values.grad, packed.detach())


def op_arguments(device):
    """One call of each op."""
    dtype = torch.bfloat16
    weight = packed_weight(64, 128, dtype, device)
    dense = torch.randn(64, 128, device=device).to(dtype)
    x = torch.randn(32, 128, device=device).to(dtype)
    bias = torch.randn(64, device=device).to(dtype)
    operand = operand_of(weight, device, dtype)
    bits = (weight.row_bits, weight.column_bits)
    return {
        "sparse_mm": (operand, x, 64, 1, bias),
        "sparse_mm_add_": (torch.randn(32, 64, device=device).to(dtype), operand, x, 1, bias),
        "join_input": (x, torch.randn(8, 128, device=device).to(dtype), 32, 0.5),
        "gather_kept": (dense, weight.row_bits),
        "unpack_kept": (weight.values, weight.row_bits),
        "refresh_": (weight.values, *bits, operand.clone(), operand.clone(), 1, 1),
        "choose_column": (weight.values, weight.row_bits),
        "row_metadata": (weight.row_bits,),
        "column_metadata": bits,
    }


OPS = [
    "sparse_mm",
    "sparse_mm_add_",
    "join_input",
    "gather_kept",
    "unpack_kept",
    "refresh_",
    "choose_column",
    "row_metadata",
    "column_metadata",
]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, device):
    torch.library.opcheck(getattr(torch.ops.slope, name).default, op_arguments(device)[name])


def strided(tensor):
    """The same matrix with every second element of memory skipped, so that its rows are not contiguous."""
    apart = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)
    apart[..., 0] = tensor
    return apart[..., 0]


@pytest.mark.parametrize("name", OPS)
def test_inputs_that_are_not_contiguous(name, device):
    """Matrices may come as views; operand buffers are the backend's own and are whole."""
    op, arguments = getattr(torch.ops.slope, name), op_arguments(device)[name]
    tensors = {index: each for index, each in enumerate(arguments) if isinstance(each, torch.Tensor)}
    views = list(arguments)
    for index, tensor in tensors.items():
        views[index] = strided(tensor) if tensor.dim() == 2 else tensor.clone()
    found, expected = op(*views), op(*arguments)
    outputs = [(found, expected)] if found is not None else list(zip(views, arguments, strict=True))
    assert all(torch.equal(one, other) for one, other in outputs if isinstance(one, torch.Tensor))
