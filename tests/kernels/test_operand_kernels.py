"""refresh, metadata, gather and unpack against their plain-torch references: equal to the bit, on poisoned outputs."""

import pytest
import torch

from slope_megatron.sparsity.operand import backward_slots, metadata_sm90, slot_indices
from slope_megatron.sparsity.packing import pack, pack_bits, unpack, unpack_bits
from slope_megatron.sparsity.pattern import column_pattern, random_pattern

DTYPES = [torch.bfloat16, torch.float16]
POISON = 0xAB


@pytest.fixture
def fewer_programs(device):
    """`fewer_programs(name=value)`: settings for wider programs in Triton's interpreter, which takes as long for each
    as for a narrow one; none on a GPU, where the defaults are what runs."""
    return lambda **wider: wider if device == "cpu" else {}


def problem(rows, columns, dtype, device, seed, kind="normal"):
    """values [N, C], row pattern [N, K], column pattern [N, C], both bitmasks."""
    generator = torch.Generator().manual_seed(seed)
    row = random_pattern(torch.randint(0, 1 << 32, (rows, columns), generator=generator), 2, 4)
    values = torch.randn(rows, columns // 2, generator=generator)
    if kind == "ties":
        # Few different magnitudes, both zeros, infinities and NaN: the order of equals decides.
        choices = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), -float("inf"), float("nan"), 65504.0])
        values = choices[torch.randint(0, len(choices), values.shape, generator=generator)]
    if kind == "tiny":
        # The smallest subnormal numbers, which a device that flushes them would take for zeros.
        values = torch.randint(-3, 4, values.shape, generator=generator) * torch.finfo(dtype).smallest_normal
        values = values.double() * torch.finfo(dtype).eps
    values = values.to(dtype)
    column = pack(column_pattern(unpack(values, row), row, 2, 4), row)
    return tuple(tensor.to(device) for tensor in (values, row, column, pack_bits(row), pack_bits(column)))


def poisoned(size, device):
    return torch.full((size,), POISON, dtype=torch.uint8, device=device)


def same_bits(found, expected):
    """Equal as bits, so that NaN equals itself and 0 differs from -0."""
    return torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 192), (192, 320)])
def test_refresh_writes_both_operands_and_no_metadata(rows, columns, dtype, device, fewer_programs):
    from slope_kernels.triton.refresh import refresh

    values, row, column, row_bits, column_bits = problem(rows, columns, dtype, device, seed=rows)
    size = rows * columns
    forward, backward = poisoned(size * 9 // 8, device), poisoned(size * 9 // 8, device)
    refresh(values, row_bits, column_bits, forward, backward, **fewer_programs(lanes=(8, 16)))
    assert same_bits(forward[:size].view(dtype).view_as(values), values)
    expected, _ = backward_slots(values, row, column)
    # A surviving -0.0 stays; slots without a survivor are +0.0 in both.
    assert torch.equal(backward[:size].view(dtype).view_as(expected), expected)
    assert (forward[size:] == POISON).all() and (backward[size:] == POISON).all()


@pytest.mark.parametrize("tiles", [2, 3])
def test_refresh_of_tiles_is_a_refresh_of_each(tiles, device, fewer_programs):
    from slope_kernels.triton.refresh import refresh

    rows, columns, dtype = 192, 384, torch.bfloat16
    values, row, column, row_bits, column_bits = problem(rows, columns, dtype, device, seed=5)
    size = rows * columns
    forward, backward = poisoned(size * 9 // 8, device), poisoned(size * 9 // 8, device)
    settings = {"forward_tiles": tiles, "backward_tiles": tiles, **fewer_programs(lanes=(8, 16))}
    refresh(values, row_bits, column_bits, forward, backward, **settings)
    transposed, _ = backward_slots(values, row, column)
    for buffer, expected in ((forward, values), (backward, transposed)):
        found = buffer.view(tiles, -1)[:, : size // tiles].contiguous()
        assert torch.equal(found.view(dtype).view_as(expected), expected)
        assert (buffer.view(tiles, -1)[:, size // tiles :] == POISON).all()


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_refresh_of_one_operand_leaves_the_other_alone(which, device):
    from slope_kernels.triton.refresh import refresh

    values, row, column, row_bits, column_bits = problem(64, 128, torch.bfloat16, device, seed=9)
    buffer = poisoned(64 * 128 * 9 // 8, device)
    before = values.clone()
    refresh(values, row_bits, column_bits, **{"forward": None, "backward": None, which: buffer})
    expected = values if which == "forward" else backward_slots(values, row, column)[0]
    assert torch.equal(buffer[: 64 * 128].view(torch.bfloat16).view_as(expected), expected)
    assert torch.equal(values, before)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 192), (192, 128)])
def test_metadata_of_both_operands(rows, columns, device):
    from slope_kernels.triton.metadata import column_metadata, row_metadata

    values, row, column, row_bits, column_bits = problem(rows, columns, torch.bfloat16, device, seed=columns)
    found = poisoned(rows * columns // 8, device)
    row_metadata(row_bits, found)
    assert torch.equal(found, metadata_sm90(slot_indices(row)))
    found.fill_(POISON)
    column_metadata(row_bits, column_bits, found)
    assert torch.equal(found, metadata_sm90(backward_slots(values, row, column)[1]))


@pytest.mark.parametrize("kind", ["normal", "ties", "tiny"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(12, 96), (192, 320)])
def test_choosing_the_second_pruning(rows, columns, dtype, kind, device, fewer_programs):
    from slope_kernels.triton.choose import choose_column

    values, _, _, row_bits, column_bits = problem(rows, columns, dtype, device, seed=rows + 1, kind=kind)
    found = poisoned(column_bits.numel(), device).view_as(column_bits)
    choose_column(values, row_bits, found, **fewer_programs(threads=256))
    assert torch.equal(found, column_bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (100, 80), (64, 2048)])
def test_gather_and_unpack(rows, columns, dtype, device):
    from slope_kernels.triton.gather import gather
    from slope_kernels.triton.gather import unpack as unpack_kernel

    values, row, _, row_bits, _ = problem(rows, columns, dtype, device, seed=columns)
    dense = torch.randn(rows, columns, device=device).to(dtype)
    packed = torch.full_like(values, float("nan"))
    gather(dense, row_bits, packed)
    assert torch.equal(packed, pack(dense, row))
    whole = torch.full_like(dense, float("nan"))
    unpack_kernel(values, row_bits, whole)
    assert torch.equal(whole, unpack(values, row))


@pytest.mark.gpu
def test_more_elements_than_a_32_bit_index_holds(device):
    """2^31 + 2^22 dense weights: checked at both ends and in the middle, where 32-bit offsets would have wrapped."""
    from slope_kernels.triton.gather import gather
    from slope_kernels.triton.gather import unpack as unpack_kernel
    from slope_kernels.triton.refresh import refresh

    rows, columns = 65664, 32768
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    dense = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    row_bits = torch.full((rows, columns // 8), 0b01100110, dtype=torch.uint8, device=device)
    packed = torch.full((rows, columns // 2), float("nan"), dtype=torch.bfloat16, device=device)
    gather(dense, row_bits, packed)
    kept = dense.view(rows, -1, 4)[:, :, 1:3].reshape(rows, -1)
    assert torch.equal(packed, kept)
    dense.fill_(float("nan"))
    unpack_kernel(packed, row_bits, dense)
    assert torch.equal(dense.view(rows, -1, 4)[:, :, 1:3].reshape(rows, -1), kept)
    assert (dense.view(rows, -1, 4)[:, :, 0] == 0).all()
    del dense, kept
    column_bits = torch.full((rows, columns // 16), 255, dtype=torch.uint8, device=device)
    # Rows 4g and 4g + 1 survive only: two a column group.
    column_bits.view(-1, 4, columns // 16)[:, 2:] = 0
    operand = torch.zeros(rows * columns * 9 // 8, dtype=torch.uint8, device=device)
    refresh(packed, row_bits, column_bits, None, operand)
    backward = operand[: rows * columns].view(torch.bfloat16).view(columns, rows // 2)
    for column in (1, columns // 2 + 2, columns - 2):
        expected = packed[:, column // 4 * 2 + column % 4 - 1].view(-1, 4)[:, :2].reshape(-1)
        assert torch.equal(backward[column], expected)


@pytest.mark.gpu
def test_patterns_of_more_weights_than_a_32_bit_index_holds(device):
    """2^31 + 2^22 weights: rows and columns from both ends against the references."""
    from slope_kernels.triton.choose import choose_column
    from slope_kernels.triton.metadata import column_metadata, row_metadata
    from slope_kernels.triton.refresh import refresh
    from slope_megatron.ops.autotune.trials import random_bits

    rows, columns = 65664, 32768
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free GPU memory")
    size = rows * columns
    values = torch.randn(rows, columns // 2, device=device, dtype=torch.bfloat16)
    row_bits = random_bits(rows, columns, device)
    column_bits = poisoned(size // 16, device).view(rows, -1)
    choose_column(values, row_bits, column_bits)
    row_meta, column_meta = poisoned(size // 8, device), poisoned(size // 8, device)
    row_metadata(row_bits, row_meta)
    column_metadata(row_bits, column_bits, column_meta)
    forward, backward = poisoned(size * 9 // 8, device), poisoned(size * 9 // 8, device)
    refresh(values, row_bits, column_bits, forward, backward)
    assert same_bits(forward[:size].view(torch.bfloat16).view_as(values), values)
    assert (forward[size:] == POISON).all() and (backward[size:] == POISON).all()
    transposed = backward[:size].view(torch.bfloat16).view(columns, rows // 2)
    for block in (0, rows // 128, rows // 64 - 1):
        part = slice(block * 64, block * 64 + 64)
        row = unpack_bits(row_bits[part])
        column = column_pattern(unpack(values[part], row), row, 2, 4)
        assert torch.equal(column_bits[part], pack_bits(pack(column, row)))
        found = row_meta.view(rows // 64, -1)[block]
        assert torch.equal(found, metadata_sm90(slot_indices(row)))
    for block in (0, columns // 128, columns // 64 - 1):
        row = unpack_bits(row_bits[:, block * 8 : block * 8 + 8])
        kept = unpack_bits(column_bits[:, block * 4 : block * 4 + 4])
        slots, indices = backward_slots(values[:, block * 32 : block * 32 + 32], row, kept)
        assert torch.equal(transposed[block * 64 : block * 64 + 64], slots)
        assert torch.equal(column_meta.view(columns // 64, -1)[block], metadata_sm90(indices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 192), (3, 8)])
def test_kept_values_are_added_to_a_sum_as_they_are_gathered(rows, columns, dtype, device):
    from slope_kernels.triton.gather import gather_add

    generator = torch.Generator().manual_seed(rows)
    row = random_pattern(torch.randint(0, 1 << 32, (rows, columns), generator=generator), 2, 4)
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    dense[0, :4], dense[-1, -4:] = float("inf"), torch.finfo(dtype).smallest_normal / 4
    total = torch.randn(rows, columns // 2, generator=generator)
    expected = total + pack(dense, row).float()
    found = total.to(device)
    gather_add(dense.to(device), pack_bits(row).to(device), found)
    assert torch.equal(found.cpu(), expected)
