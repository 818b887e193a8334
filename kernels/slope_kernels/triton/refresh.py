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

from slope_kernels.triton.places import permute_bytes, slot_places, spread, survivors


@triton.jit
def _which(kept, j: tl.constexpr, table: tl.constexpr, NATIVE: tl.constexpr):
    """The bytes of a pair that hold its value at column j, a byte for each of four groups.

    A kept column 0 is the low value and a kept column 3 the high one; column 1 is the high one where column 0 is kept,
    and column 2 the low one where column 3 is. At a column that is not kept it is either.

    Args:
        kept: row patterns, 16 bits.
        table: the bytes of a low and of a high value.
    """
    if j == 0:
        bits = kept & 0
    elif j == 1:
        bits = kept & 0x1111
    elif j == 2:
        bits = (~kept >> 3) & 0x1111
    else:
        bits = (kept & 0) + 0x1111
    return permute_bytes((kept & 0) + table, kept & 0, bits, NATIVE)


@triton.jit
def _two_rows(upper, lower, which_upper, which_lower, q: tl.constexpr, NATIVE: tl.constexpr):
    """The values of two rows at one column of group q, the upper row's in the low half."""
    selector = permute_bytes(which_upper, which_lower, (upper & 0) + (0x40 + 0x11 * q), NATIVE)
    return permute_bytes(upper, lower, selector, NATIVE)


@triton.jit
def _bytes_of(bits, q: tl.constexpr):
    """Bits 16 h + 4 q + j of words `[T, P]` as bytes: byte j of `[:, :, h]`."""
    return spread((bits[:, :, None] >> (tl.arange(0, 2) * 16 + 4 * q)[None, None, :]) & 15)


@triton.jit
def _slots(a1, a2, a3):
    """Per column the byte pairs that its two slots take of four rows' values: 0x10 + 0x22 place, a byte a column."""
    first0, first1, second0, second1 = slot_places(a1, a2, a3, 0x01010101)
    return 0x10101010 + 0x22 * first0 + 0x44 * first1, 0x10101010 + 0x22 * second0 + 0x44 * second1


@triton.jit
def _operand_row(row, tile_rows, tile_stride, row_stride, TILED: tl.constexpr):
    """Offset of an operand's row, which may lie in a later tile."""
    row = row.to(tl.int64)
    if TILED:
        return (row // tile_rows) * tile_stride + (row % tile_rows) * row_stride
    return row * row_stride


@triton.jit
def _load_patterns(row_bits, column_bits, place, mask, NATIVE: tl.constexpr):
    """One row's pattern in each group, `[T, P, 2]`, and its survivors, two groups a word, `[T, P]`."""
    kept = tl.load(row_bits + place, mask=mask).to(tl.int32)
    kept_low, kept_high = tl.split(kept)
    low, high = tl.split(tl.load(column_bits + place, mask=mask).to(tl.int32))
    return kept, survivors(kept_low | (kept_high << 16), low | (high << 8), NATIVE)


@triton.jit
def _place_of_program(height, width, BAND: tl.constexpr):
    """Row and column of this program's tile: bands of BAND tile rows, column by column.

    Programs that run together then write to neighbouring places of both operands.
    """
    program = tl.program_id(0)
    band = program // (BAND * width)
    rows = min(height - band * BAND, BAND)
    within = program - band * BAND * width
    return band * BAND + within % rows, within // rows


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
    PAIRS: tl.constexpr,
    BAND: tl.constexpr,
):
    """A thread has a chunk of 16 columns of PAIRS pairs of groups: 16 bytes a row in, 8 PAIRS bytes a column out.

    Axes: thread, pair of groups of four rows, the two of a pair, four groups of columns. Pointers are to 32-bit pairs,
    to the 16 bits of a chunk in the row bitmask, and to its 8 bits in the column bitmask.
    """
    thread = tl.arange(0, LANES_G * LANES_C)
    across, along = _place_of_program(tl.cdiv(groups, 2 * PAIRS * LANES_G), tl.cdiv(chunks, LANES_C), BAND)
    group = (across * LANES_G + thread % LANES_G) * (2 * PAIRS)
    chunk = along * LANES_C + thread // LANES_G
    mask = (group < groups) & (chunk < chunks)
    mask4 = mask[:, None, None, None]
    rows = ((tl.arange(0, PAIRS) * 8)[:, None] + (tl.arange(0, 2) * 4)[None, :]) * chunks
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
        place, mask3 = start[:, None, None] + rows[None, :, :], mask[:, None, None]
        k0, a0 = _load_patterns(row_bits, column_bits, place, mask3, NATIVE)
        k1, a1 = _load_patterns(row_bits, column_bits, place + chunks, mask3, NATIVE)
        k2, a2 = _load_patterns(row_bits, column_bits, place + 2 * chunks, mask3, NATIVE)
        k3, a3 = _load_patterns(row_bits, column_bits, place + 3 * chunks, mask3, NATIVE)
        first = _operand_row(chunk * 16, backward_tile_rows, backward_tile_stride, groups, BACKWARD_TILED) + group
        backward += first[:, None] + tl.arange(0, 2 * PAIRS)[None, :]
        p0, p1, p2, p3 = _by_group(p0), _by_group(p1), _by_group(p2), _by_group(p3)
        w01, w02 = _which(k0, 1, 0x3210, NATIVE), _which(k0, 2, 0x3210, NATIVE)
        w11, w12 = _which(k1, 1, 0x7654, NATIVE), _which(k1, 2, 0x7654, NATIVE)
        w21, w22 = _which(k2, 1, 0x3210, NATIVE), _which(k2, 2, 0x3210, NATIVE)
        w31, w32 = _which(k3, 1, 0x7654, NATIVE), _which(k3, 2, 0x7654, NATIVE)
        zero = k0 & 0
        for q in tl.static_range(4):
            b0, b1 = _bytes_of(a0, q), _bytes_of(a1, q)
            first_slot, second_slot = _slots(b1, _bytes_of(a2, q), _bytes_of(a3, q))
            # A slot without a survivor takes row 0 or 1, where a weight that does not survive is made zero.
            b0, b1 = b0 * 255, b1 * 255
            u0 = permute_bytes(p0[q], p1[q], zero + 0x5410, NATIVE)
            u1 = _two_rows(p0[q], p1[q], w01, w11, q, NATIVE)
            u2 = _two_rows(p0[q], p1[q], w02, w12, q, NATIVE)
            u3 = permute_bytes(p0[q], p1[q], zero + 0x7632, NATIVE)
            l0 = permute_bytes(p2[q], p3[q], zero + 0x5410, NATIVE)
            l1 = _two_rows(p2[q], p3[q], w21, w31, q, NATIVE)
            l2 = _two_rows(p2[q], p3[q], w22, w32, q, NATIVE)
            l3 = permute_bytes(p2[q], p3[q], zero + 0x7632, NATIVE)
            column = backward + 4 * q * groups
            _store_column(column, u0, l0, b0, b1, first_slot, second_slot, mask, 0, NATIVE, PAIRS)
            _store_column(column + groups, u1, l1, b0, b1, first_slot, second_slot, mask, 1, NATIVE, PAIRS)
            _store_column(column + 2 * groups, u2, l2, b0, b1, first_slot, second_slot, mask, 2, NATIVE, PAIRS)
            _store_column(column + 3 * groups, u3, l3, b0, b1, first_slot, second_slot, mask, 3, NATIVE, PAIRS)


@triton.jit
def _store_column(
    column,
    upper,
    lower,
    alive0,
    alive1,
    first,
    second,
    mask,
    j: tl.constexpr,
    NATIVE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    zero = upper & 0
    upper &= permute_bytes(alive0, alive1, zero + (0x4400 + 0x1111 * j), NATIVE)
    slots = permute_bytes(first, second, zero + (0x40 + 0x11 * j), NATIVE)
    pairs = permute_bytes(upper, lower, slots, NATIVE)
    tl.store(column, tl.reshape(pairs, (pairs.shape[0], 2 * PAIRS)), mask=mask[:, None])


@triton.jit
def _by_group(pairs):
    """`[T, P, 2, 4]` -> four `[T, P, 2]`."""
    even, odd = tl.split(tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], 2, 2, 2)))
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    return q0, q1, q2, q3


def refresh(
    values_NC: torch.Tensor,
    row_bits: torch.Tensor,
    column_bits: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    *,
    forward_tiles: int = 1,
    backward_tiles: int = 1,
    lanes: tuple[int, int] = (8, 16),
    pairs: int = 1,
    band: int = 16,
    registers: int | None = None,
) -> None:
    """Write the operands' values; their metadata is left alone.

    Args:
        values_NC: 16-bit, contiguous, 4-byte aligned; N and K multiples of 16, as those of each tile.
        row_bits, column_bits: uint8 bitmasks of 2:4 patterns, the row one 2-byte aligned.
        forward, backward: uint8 operand buffers, values in front of the metadata in each tile; None: leave it out.
        lanes: threads of a program along rows and along columns; pairs of groups a thread; most registers a thread.
            The defaults are the fastest tried.
    """
    rows, kept = values_NC.shape
    columns = kept * 2
    lanes_g, lanes_c = lanes
    grid = (triton.cdiv(columns // 16, lanes_c) * triton.cdiv(rows // (8 * pairs), lanes_g),)
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
        PAIRS=pairs,
        BAND=band,
        num_warps=lanes_g * lanes_c // 32,
        maxnreg=registers,
    )
