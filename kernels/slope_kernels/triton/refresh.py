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

from slope_kernels.triton.places import (
    expand,
    load_four,
    permute_bytes,
    slot_places,
    split_nibble,
    spread,
    survivors,
)


@triton.jit
def _load_row(values, four, quads_before, quad, mask, NATIVE: tl.constexpr):
    """One row's pairs, the same at their columns without those that the second pruning drops, and who survives."""
    pair = tl.load(values + (quads_before + quad), mask=mask)
    low, high = split_nibble((four >> ((quad & 3) * 4)) & 15)
    low, high = survivors(four, quad, low, high)
    front, back = expand(pair, low, high, NATIVE)
    return pair, front, back, low | high


@triton.jit
def _operand_row(row, tile_rows, tile_stride, row_stride, TILED: tl.constexpr):
    """Offset of an operand's row, which may lie in a later tile."""
    row = row.to(tl.int64)
    if TILED:
        return (row // tile_rows) * tile_stride + (row % tile_rows) * row_stride
    return row * row_stride


@triton.jit
def _two_columns(w0, w1, w2, w3, selectors, NATIVE: tl.constexpr):
    """Slot pairs of two columns, from one word a row with both columns' values and a 16-bit selector a column."""
    upper, lower = (w0 & 0xFFFF) | (w1 << 16), (w2 & 0xFFFF) | (w3 << 16)
    left = permute_bytes(upper, lower, selectors, NATIVE)
    upper, lower = ((w0 >> 16) & 0xFFFF) | (w1 & -65536), ((w2 >> 16) & 0xFFFF) | (w3 & -65536)
    return left, permute_bytes(upper, lower, selectors >> 16, NATIVE)


@triton.jit
def _slot_selectors(a0, a1, a2, a3, NATIVE: tl.constexpr):
    """Per column the bytes that its two slots take of the rows' values: 16 bits a column, two columns a word."""
    first0, first1, second0, second1 = slot_places(a0, a1, a2, a3, 15)
    first = 0x10101010 + 0x22 * spread(first0) + 0x44 * spread(first1)
    second = 0x10101010 + 0x22 * spread(second0) + 0x44 * spread(second1)
    zero = a0 & 0
    return permute_bytes(first, second, zero + 0x5140, NATIVE), permute_bytes(first, second, zero + 0x7362, NATIVE)


@triton.jit
def _refresh_kernel(
    values,
    row_bits,
    column_bits,
    forward,
    backward,
    groups,
    quads,
    forward_tile_rows,
    forward_tile_stride,
    backward_tile_rows,
    backward_tile_stride,
    WRITE_FORWARD: tl.constexpr,
    WRITE_BACKWARD: tl.constexpr,
    FORWARD_TILED: tl.constexpr,
    BACKWARD_TILED: tl.constexpr,
    EVEN: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One tile of BLOCK_G groups of four rows times BLOCK_Q groups of four columns; all pointers to 32-bit pairs."""
    quad = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    group_start = tl.program_id(1) * BLOCK_G
    group = group_start + tl.arange(0, BLOCK_G)[:, None]
    mask = None if EVEN else (quad < quads) & (group < groups)
    # 64-bit offsets up to the tile's first row, 32-bit ones within the tile.
    start = group_start.to(tl.int64) * 4 * quads
    values += start
    row_bits += start // 4
    column_bits += start // 4
    four = tl.program_id(0) * (BLOCK_Q // 4) + tl.arange(0, BLOCK_Q // 4)[None, :]
    four_mask = None if EVEN else (four < quads // 4) & (group < groups)
    before = tl.arange(0, BLOCK_G)[:, None] * 4 * quads
    four += tl.arange(0, BLOCK_G)[:, None] * quads
    t0 = load_four(row_bits, column_bits, four, four_mask, True, BLOCK_G, BLOCK_Q)
    t1 = load_four(row_bits, column_bits, four + quads // 4, four_mask, True, BLOCK_G, BLOCK_Q)
    t2 = load_four(row_bits, column_bits, four + quads // 4 * 2, four_mask, True, BLOCK_G, BLOCK_Q)
    t3 = load_four(row_bits, column_bits, four + quads // 4 * 3, four_mask, True, BLOCK_G, BLOCK_Q)
    p0, f0, b0, a0 = _load_row(values, t0, before, quad, mask, NATIVE)
    p1, f1, b1, a1 = _load_row(values, t1, before + quads, quad, mask, NATIVE)
    p2, f2, b2, a2 = _load_row(values, t2, before + 2 * quads, quad, mask, NATIVE)
    p3, f3, b3, a3 = _load_row(values, t3, before + 3 * quads, quad, mask, NATIVE)
    if WRITE_FORWARD:
        first = _operand_row(group * 4, forward_tile_rows, forward_tile_stride, quads, FORWARD_TILED)
        tile = forward + (first + quad)
        tl.store(tile, p0, mask=mask)
        tl.store(tile + quads, p1, mask=mask)
        tl.store(tile + 2 * quads, p2, mask=mask)
        tl.store(tile + 3 * quads, p3, mask=mask)
    if WRITE_BACKWARD:
        front, back = _slot_selectors(a0, a1, a2, a3, NATIVE)
        c0, c1 = _two_columns(f0, f1, f2, f3, front, NATIVE)
        c2, c3 = _two_columns(b0, b1, b2, b3, back, NATIVE)
        first = _operand_row(quad * 4, backward_tile_rows, backward_tile_stride, groups, BACKWARD_TILED)
        tile = backward + (first + group)
        tl.store(tile, c0, mask=mask)
        tl.store(tile + groups, c1, mask=mask)
        tl.store(tile + 2 * groups, c2, mask=mask)
        tl.store(tile + 3 * groups, c3, mask=mask)


def refresh(
    values_NC: torch.Tensor,
    row_bits: torch.Tensor,
    column_bits: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    *,
    forward_tiles: int = 1,
    backward_tiles: int = 1,
    blocks: tuple[int, int, int] = (8, 64, 4),
    registers: int | None = None,
) -> None:
    """Write the operands' values; their metadata is left alone.

    Args:
        values_NC: 16-bit, contiguous, 4-byte aligned; N a multiple of 4, K of 16.
        row_bits, column_bits: uint8 bitmasks of 2:4 patterns.
        forward, backward: uint8 operand buffers, values in front of the metadata in each tile; None: leave it out.
        blocks: groups of rows and of columns a program, and its warps; registers: most a thread. The defaults are the
            fastest tried on an H200.
    """
    rows, kept = values_NC.shape
    columns = kept * 2
    block_g, block_q, warps = blocks
    grid = (triton.cdiv(columns // 4, block_q), triton.cdiv(rows // 4, block_g))
    # A tile is its values and one eighth as much metadata; strides count 32-bit pairs.
    pairs_per_weight = 9 / 32
    _refresh_kernel[grid](
        values_NC.view(torch.int32),
        row_bits.view(torch.uint16),
        column_bits,
        forward.view(torch.int32) if forward is not None else values_NC.view(torch.int32),
        backward.view(torch.int32) if backward is not None else values_NC.view(torch.int32),
        rows // 4,
        columns // 4,
        rows // forward_tiles,
        int(rows // forward_tiles * columns * pairs_per_weight),
        columns // backward_tiles,
        int(columns // backward_tiles * rows * pairs_per_weight),
        WRITE_FORWARD=forward is not None,
        WRITE_BACKWARD=backward is not None,
        FORWARD_TILED=forward_tiles > 1,
        BACKWARD_TILED=backward_tiles > 1,
        EVEN=rows % (4 * block_g) == 0 and columns % (4 * block_q) == 0,
        NATIVE=values_NC.is_cuda,
        BLOCK_G=block_g,
        BLOCK_Q=block_q,
        num_warps=warps,
        maxnreg=registers,
    )
