"""refresh: packed values -> the values of the forward and of the backward operand, in one pass over the weight.

N out, K in, C = K/2 kept per row, all 16-bit values. A pair is the two kept values of one group of four.
    values    [N, C]      the parameter
    forward   [N, C]      the same values, where the sparse product wants them
    backward  [K, N/2]    the transposed, doubly pruned W^{R,C}: slot s of rows 4g..4g+3 of column k at [k, 2g + s]
Operands may be cut into row tiles, each with its own metadata behind it: hence a tile's rows and its stride in memory.
Traffic: 2 B read and 2 + 2 B written a kept value, plus 3/16 B of bitmasks a weight.
Oracle: `slope_megatron.sparsity.operand`.
"""

import torch
import triton
import triton.language as tl

from slope_kernels.triton.bits import permute_bytes, slot_indices, spread, survivors


@triton.jit
def _high_at(kept, j: tl.constexpr, table: tl.constexpr, NATIVE: tl.constexpr):
    """The bytes of a pair that hold its value at column j, 1 or 2, a byte for each of four groups.

    Column 1 has the high value where column 0 is kept too, column 2 the low one where column 3 is. At a column that is
    not kept it is either.

    Args:
        kept: row patterns, 16 bits.
        table: the bytes of a low and of a high value.
    """
    bits = kept & 0x1111 if j == 1 else (~kept >> 3) & 0x1111
    return permute_bytes((kept & 0) + table, kept & 0, bits, NATIVE)


@triton.jit
def _selectors_of_rows(kept_upper, kept_lower, NATIVE: tl.constexpr):
    """For two rows what `_two_rows` needs of their patterns."""
    return (
        _high_at(kept_upper, 1, 0x3210, NATIVE),
        _high_at(kept_lower, 1, 0x7654, NATIVE),
        _high_at(kept_upper, 2, 0x3210, NATIVE),
        _high_at(kept_lower, 2, 0x7654, NATIVE),
    )


@triton.jit
def _two_rows(upper, lower, high, q: tl.constexpr, NATIVE: tl.constexpr):
    """The values of two rows at the four columns of group q: four words, the upper row's value in the low half.

    A kept column 0 has the low value of a pair, and a kept column 3 the high one.
    """
    zero = upper & 0
    group = zero + (0x40 + 0x11 * q)
    return (
        permute_bytes(upper, lower, zero + 0x5410, NATIVE),
        permute_bytes(upper, lower, permute_bytes(high[0], high[1], group, NATIVE), NATIVE),
        permute_bytes(upper, lower, permute_bytes(high[2], high[3], group, NATIVE), NATIVE),
        permute_bytes(upper, lower, zero + 0x7632, NATIVE),
    )


@triton.jit
def _bytes_of(bits, q: tl.constexpr):
    """Bits 16 h + 4 q + j of words `[T, 2]` as bytes: byte j of `[:, :, h]`."""
    return spread((bits[:, :, None] >> (tl.arange(0, 2) * 16 + 4 * q)[None, None, :]) & 15)


@triton.jit
def _slots(a1, a2, a3):
    """Per column the byte pairs that its two slots take of four rows' values: 0x10 + 0x22 index, a byte a column."""
    first0, first1, second0, second1 = slot_indices(a1, a2, a3, 0x01010101)
    return 0x10101010 + 0x22 * first0 + 0x44 * first1, 0x10101010 + 0x22 * second0 + 0x44 * second1


@triton.jit
def _slot_pairs(upper, lower, alive0, alive1, slots, j: tl.constexpr, NATIVE: tl.constexpr):
    """Both slots of column j of a group: from the values of four rows there, or zero.

    A slot without a survivor takes row 0 or 1, whose values are made zero where they do not survive.
    """
    zero = upper[j] & 0
    upper_alive = upper[j] & permute_bytes(alive0, alive1, zero + (0x4400 + 0x1111 * j), NATIVE)
    selector = permute_bytes(slots[0], slots[1], zero + (0x40 + 0x11 * j), NATIVE)
    return permute_bytes(upper_alive, lower[j], selector, NATIVE)


@triton.jit
def _by_group(pairs):
    """`[T, 2, 2, 4]` -> four `[T, 2, 2]`, one for each group of columns."""
    even, odd = tl.split(tl.reshape(pairs, (pairs.shape[0], 2, 2, 2, 2)))
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    return q0, q1, q2, q3


@triton.jit
def _operand_row(row, tile_rows, tile_stride, row_stride, TILED: tl.constexpr):
    """Offset of an operand's row, which may lie in a later tile."""
    row = row.to(tl.int64)
    if TILED:
        return (row // tile_rows) * tile_stride + (row % tile_rows) * row_stride
    return row * row_stride


@triton.jit
def _load_patterns(row_bits, column_bits, offset, mask, NATIVE: tl.constexpr):
    """One row's pattern in each group, `[T, 2, 2]`, and its survivors, two groups a word, `[T, 2]`."""
    kept = tl.load(row_bits + offset, mask=mask).to(tl.int32)
    kept_low, kept_high = tl.split(kept)
    low, high = tl.split(tl.load(column_bits + offset, mask=mask).to(tl.int32))
    return kept, survivors(kept_low | (kept_high << 16), low | (high << 8), NATIVE)


@triton.jit
def _tile_of_program(height, width, BAND: tl.constexpr):
    """Row and column of this program's tile: bands of BAND tile rows, column by column.

    Programs that run together then write to neighbouring addresses of both operands.
    """
    program = tl.program_id(0)
    band = program // (BAND * width)
    rows = min(height - band * BAND, BAND)
    within = program - band * BAND * width
    return band * BAND + within % rows, within // rows


@triton.jit
def _write_backward(backward, groups, rows, row_bits, column_bits, offset, chunks, mask, NATIVE: tl.constexpr):
    """The 16 columns of a thread: 16 bytes each, the slots of its four groups. `rows`: pairs of the rows i = 0..3."""
    mask3 = mask[:, None, None]
    k0, a0 = _load_patterns(row_bits, column_bits, offset, mask3, NATIVE)
    k1, a1 = _load_patterns(row_bits, column_bits, offset + chunks, mask3, NATIVE)
    k2, a2 = _load_patterns(row_bits, column_bits, offset + 2 * chunks, mask3, NATIVE)
    k3, a3 = _load_patterns(row_bits, column_bits, offset + 3 * chunks, mask3, NATIVE)
    high01, high23 = _selectors_of_rows(k0, k1, NATIVE), _selectors_of_rows(k2, k3, NATIVE)
    p0, p1, p2, p3 = _by_group(rows[0]), _by_group(rows[1]), _by_group(rows[2]), _by_group(rows[3])
    backward += tl.arange(0, 4)[None, :]
    for q in tl.static_range(4):
        alive0, alive1 = _bytes_of(a0, q), _bytes_of(a1, q)
        slots = _slots(alive1, _bytes_of(a2, q), _bytes_of(a3, q))
        upper, lower = _two_rows(p0[q], p1[q], high01, q, NATIVE), _two_rows(p2[q], p3[q], high23, q, NATIVE)
        alive0, alive1 = alive0 * 255, alive1 * 255
        for j in tl.static_range(4):
            pairs = _slot_pairs(upper, lower, alive0, alive1, slots, j, NATIVE)
            column = tl.reshape(pairs, (pairs.shape[0], 4))
            tl.store(backward + (4 * q + j) * groups, column, mask=mask[:, None])


@triton.jit
def _refresh_kernel(
    values,
    row_bits,
    column_bits,
    forward,
    backward,
    groups,
    chunks,
    forward_tile_rows,
    forward_tile_stride,
    backward_tile_rows,
    backward_tile_stride,
    WRITE_FORWARD: tl.constexpr,
    WRITE_BACKWARD: tl.constexpr,
    FORWARD_TILED: tl.constexpr,
    BACKWARD_TILED: tl.constexpr,
    NATIVE: tl.constexpr,
    LANES_G: tl.constexpr,
    LANES_C: tl.constexpr,
    BAND: tl.constexpr,
):
    """A thread has a chunk of 16 columns of four groups of four rows: 16 bytes a row in, 16 bytes a column out.

    Axes: thread, two pairs of groups, the two of a pair, four groups of columns. Pointers are to 32-bit pairs, to the
    16 bits of a chunk in the row bitmask, and to its 8 bits in the column bitmask.
    """
    thread = tl.arange(0, LANES_G * LANES_C)
    across, along = _tile_of_program(tl.cdiv(groups, 4 * LANES_G), tl.cdiv(chunks, LANES_C), BAND)
    group = (across * LANES_G + thread % LANES_G) * 4
    chunk = along * LANES_C + thread // LANES_G
    mask = (group < groups) & (chunk < chunks)
    mask4 = mask[:, None, None, None]
    rows = ((tl.arange(0, 2) * 8)[:, None] + (tl.arange(0, 2) * 4)[None, :]) * chunks
    pairs = rows[None, :, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    start = group.to(tl.int64) * 4 * chunks + chunk
    values += (start * 4)[:, None, None, None] + pairs
    p0 = tl.load(values, mask=mask4)
    p1 = tl.load(values + 4 * chunks, mask=mask4)
    p2 = tl.load(values + 8 * chunks, mask=mask4)
    p3 = tl.load(values + 12 * chunks, mask=mask4)
    if WRITE_FORWARD:
        first = _operand_row(group * 4, forward_tile_rows, forward_tile_stride, chunks * 4, FORWARD_TILED) + chunk * 4
        forward += first[:, None, None, None] + pairs
        tl.store(forward, p0, mask=mask4)
        tl.store(forward + 4 * chunks, p1, mask=mask4)
        tl.store(forward + 8 * chunks, p2, mask=mask4)
        tl.store(forward + 12 * chunks, p3, mask=mask4)
    if WRITE_BACKWARD:
        first = _operand_row(chunk * 16, backward_tile_rows, backward_tile_stride, groups, BACKWARD_TILED) + group
        offset = start[:, None, None] + rows[None, :, :]
        rows4 = (p0, p1, p2, p3)
        _write_backward(backward + first[:, None], groups, rows4, row_bits, column_bits, offset, chunks, mask, NATIVE)


def refresh(
    values_NC: torch.Tensor,
    row_bits: torch.Tensor,
    column_bits: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    *,
    forward_tiles: int = 1,
    backward_tiles: int = 1,
    lanes: tuple[int, int] = (4, 16),
    band: int = 4,
) -> None:
    """Write the operands' values; their metadata is left alone.

    Args:
        values_NC: 16-bit, contiguous, 4-byte aligned; N and K multiples of 16, as those of each tile.
        row_bits, column_bits: uint8 bitmasks of 2:4 patterns, the row one 2-byte aligned.
        forward, backward: uint8 operand buffers, values in front of the metadata in each tile; None: leave it out.
        lanes: threads of a program along rows and along columns.
        band: see `_tile_of_program`. The defaults are the fastest tried on an H200.
    """
    rows, kept = values_NC.shape
    columns = kept * 2
    lanes_g, lanes_c = lanes
    grid = (triton.cdiv(columns // 16, lanes_c) * triton.cdiv(rows // 16, lanes_g),)
    # A tile is its values and one eighth as much metadata; strides count 32-bit pairs.
    pairs_per_weight = 9 / 32
    _refresh_kernel[grid](
        values_NC.view(torch.int32),
        row_bits.view(torch.uint16),
        column_bits,
        forward.view(torch.int32) if forward is not None else values_NC.view(torch.int32),
        backward.view(torch.int32) if backward is not None else values_NC.view(torch.int32),
        rows // 4,
        columns // 16,
        rows // forward_tiles,
        int(rows // forward_tiles * columns * pairs_per_weight),
        columns // backward_tiles,
        int(columns // backward_tiles * rows * pairs_per_weight),
        WRITE_FORWARD=forward is not None,
        WRITE_BACKWARD=backward is not None,
        FORWARD_TILED=forward_tiles > 1,
        BACKWARD_TILED=backward_tiles > 1,
        NATIVE=values_NC.is_cuda,
        LANES_G=lanes_g,
        LANES_C=lanes_c,
        BAND=band,
        num_warps=lanes_g * lanes_c // 32,
    )
