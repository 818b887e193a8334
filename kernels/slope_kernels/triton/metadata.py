"""The metadata that says where kept values belong, in cuSPARSELt's layout for 16-bit types on sm_90.

One nibble a group of four: first place | second place << 2. An operand of R rows and G groups a row is cut into blocks
of 64 rows x 8 groups (256 bytes), group-major within a row block. Within a block the address of a nibble is, from the
highest bit down, r5 r4 r2 r1 r0 g1 g0 g2 r3 (r row, g group): found by setting one group at a time and compressing.
The layout is the library's own affair: `slope_megatron.ops.layout` verifies it against the library's compressor before
it is used, and falls back to that compressor.

    row_metadata      of W^R from the row bitmask
    column_metadata   of the transposed W^{R,C} from both bitmasks
    choose_column     the second pruning by magnitude -> its bitmask, and that metadata
Oracle: `slope_megatron.sparsity.operand`.
"""

import torch
import triton
import triton.language as tl

from slope_kernels.triton.places import expand, load_four, slot_places, split_nibble, spread, survivors


@triton.jit
def _nibbles_of_word(masks):
    """Metadata nibbles of eight groups from their eight row nibbles, all at once."""
    first0, first1, second0, second1 = slot_places(
        masks & 0x11111111, (masks >> 1) & 0x11111111, (masks >> 2) & 0x11111111, (masks >> 3) & 0x11111111, 0x11111111
    )
    return first0 | (first1 << 1) | (second0 << 2) | (second1 << 3)


@triton.jit
def _byte_of(word, word_below, group: tl.constexpr):
    """One group's nibbles in the rows r (low half) and r + 8."""
    return ((word >> (4 * group)) & 15) | (((word_below >> (4 * group)) & 15) << 4)


@triton.jit
def _row_metadata_kernel(row_masks, metadata, group_blocks, BLOCK: tl.constexpr):
    """64 rows of BLOCK blocks of eight groups: 32 pairs of rows (r, r + 8), each with two words of a block."""
    pair = tl.arange(0, 32)[:, None]
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = block < group_blocks
    row_block = tl.program_id(1).to(tl.int64)
    place = (row_block * 64 + pair // 8 * 16 + pair % 8) * group_blocks + block
    word = _nibbles_of_word(tl.load(row_masks + place, mask=mask, other=0))
    below = _nibbles_of_word(tl.load(row_masks + place + 8 * group_blocks, mask=mask, other=0))
    even = _byte_of(word, below, 0) | (_byte_of(word, below, 4) << 8)
    even |= (_byte_of(word, below, 1) << 16) | (_byte_of(word, below, 5) << 24)
    odd = _byte_of(word, below, 2) | (_byte_of(word, below, 6) << 8)
    odd |= (_byte_of(word, below, 3) << 16) | (_byte_of(word, below, 7) << 24)
    target = metadata + (row_block * group_blocks + block) * 64 + pair * 2
    tl.store(target, even, mask=mask)
    tl.store(target + 1, odd, mask=mask)


def row_metadata(row_bits: torch.Tensor, metadata: torch.Tensor) -> None:
    """Write the metadata of W^R `[N, K]`; N a multiple of 64, K of 32.

    Args:
        row_bits: uint8 `[N, K/8]`, contiguous, 4-byte aligned.
        metadata: uint8 `[N K / 8]`.
    """
    group_blocks, block = row_bits.shape[1] // 4, 32
    grid = (triton.cdiv(group_blocks, block), row_bits.shape[0] // 64)
    _row_metadata_kernel[grid](
        row_bits.view(torch.int32), metadata.view(torch.int32), group_blocks, BLOCK=block, num_warps=4
    )


@triton.jit
def _score(value, INFINITY: tl.constexpr):
    """Rank of a 16-bit value: its magnitude's bits, which order like the number, plus 1; fits 15 bits.

    NaN counts as infinity and infinity as the largest finite number, as in `sparsity.pattern`.
    """
    magnitude = value & 0x7FFF
    return tl.where(magnitude > INFINITY, INFINITY, tl.where(magnitude == INFINITY, INFINITY - 1, magnitude)) + 1


@triton.jit
def _load_scores(values, patterns, quads_before, quad, mask, INFINITY: tl.constexpr, NATIVE: tl.constexpr):
    """One row's scores at their columns, two a word, 0 where it dropped the weight; and its lower and higher bit."""
    pair = tl.load(values + (quads_before + quad), mask=mask)
    low, high = split_nibble((patterns >> ((quad & 3) * 4)) & 15)
    scores = _score(pair, INFINITY) | (_score(pair >> 16, INFINITY) << 16)
    front, back = expand(scores, low, high, NATIVE)
    return front, back, low, high


@triton.jit
def _not_below(a, b):
    """Where a >= b, in both halves of a word: bits 15 and 31. Scores leave those bits free, so halves do not borrow."""
    return (a | -2147450880) - b


@triton.jit
def _majority(a, b, c):
    return (a & b) | (a & c) | (b & c)


@triton.jit
def _winners(s0, s1, s2, s3):
    """The two highest of four rows, the earlier of equals first: bits 15 and 31 say so for two columns.

    A row wins when it comes before at least two of the three others.
    """
    g01, g02, g03 = _not_below(s0, s1), _not_below(s0, s2), _not_below(s0, s3)
    g12, g13, g23 = _not_below(s1, s2), _not_below(s1, s3), _not_below(s2, s3)
    return (
        _majority(g01, g02, g03),
        _majority(~g01, g12, g13),
        _majority(~g02, ~g12, g23),
        _majority(~g03, ~g13, ~g23),
    )


@triton.jit
def _nibble_of_winners(front, back):
    """Bits 15 and 31 of two words -> one nibble."""
    both = ((front >> 15) & 0x00010001) | ((back >> 13) & 0x00040004)
    return (both | (both >> 15)) & 15


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _store_pair_bits(column_bits, place, alive, low, high, in_byte, mask, BG: tl.constexpr, BQ: tl.constexpr):
    """Survivors of one row in the packed bitmask: two bits a group, four groups a byte."""
    two = tl.where((alive & low) != 0, 1, 0) | tl.where((alive & high) != 0, 2, 0)
    byte = tl.reduce(tl.reshape(two << in_byte, (BG, BQ // 4, 4)), 2, _or)
    tl.store(column_bits + place, byte.to(tl.uint8), mask=mask)


@triton.jit
def _store_words(metadata, nibbles, group_block, quad_start, group_blocks, mask, BG: tl.constexpr, BQ: tl.constexpr):
    """Metadata of the columns 4 q + j, whose nibbles are the bytes j of `nibbles` [BG, BQ].

    A block's rows are those columns, its groups are groups of four rows of W.
    """
    # Row bit 3 of the operand is quad bit 1: the two nibbles of a byte.
    halves = tl.permute(tl.reshape(nibbles, (BG, BQ // 4, 2, 2)), (0, 1, 3, 2))
    low, high = tl.split(halves)
    bytes_ = tl.reshape(low | (high << 4), (BG // 8, 2, 2, 2, BQ // 4, 2))
    # Bytes of a target word, from the lowest: group bits (g0, g2) = 00, 01, 10, 11; axes here are g2, g1, g0.
    even, odd = tl.split(tl.permute(bytes_, (0, 2, 4, 5, 3, 1)))
    e0, e1 = tl.split(even)
    o0, o1 = tl.split(odd)
    g1 = tl.arange(0, 2)[None, :, None, None]
    quad = quad_start + tl.arange(0, BQ // 4)[None, None, :, None] * 4 + tl.arange(0, 2)[None, None, None, :]
    block = (quad // 16).to(tl.int64) * group_blocks + group_block
    place = metadata + (block * 64 + (quad // 4) % 4 * 16 + quad % 2 * 8 + g1)
    for j in tl.static_range(4):
        word = ((e0 >> (8 * j)) & 255) | (((o0 >> (8 * j)) & 255) << 8)
        word |= (((e1 >> (8 * j)) & 255) << 16) | (((o1 >> (8 * j)) & 255) << 24)
        tl.store(place + 2 * j, word, mask=mask)


@triton.jit
def _alive(four, quad):
    """Who survives a second pruning that is already chosen."""
    low, high = split_nibble((four >> ((quad & 3) * 4)) & 15)
    low, high = survivors(four, quad, low, high)
    return low | high


@triton.jit
def _choose(
    values, t0, t1, t2, t3, before, quad, quads, mask,
    column_bits, four, four_mask,
    INFINITY: tl.constexpr, NATIVE: tl.constexpr, BG: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The second pruning of a tile, written to `column_bits`; returns the rows' nibbles of survivors."""
    f0, b0, low0, high0 = _load_scores(values, t0, before, quad, mask, INFINITY, NATIVE)
    f1, b1, low1, high1 = _load_scores(values, t1, before + quads, quad, mask, INFINITY, NATIVE)
    f2, b2, low2, high2 = _load_scores(values, t2, before + 2 * quads, quad, mask, INFINITY, NATIVE)
    f3, b3, low3, high3 = _load_scores(values, t3, before + 3 * quads, quad, mask, INFINITY, NATIVE)
    f0, f1, f2, f3 = _winners(f0, f1, f2, f3)
    b0, b1, b2, b3 = _winners(b0, b1, b2, b3)
    a0 = _nibble_of_winners(f0, b0) & (low0 | high0)
    a1 = _nibble_of_winners(f1, b1) & (low1 | high1)
    a2 = _nibble_of_winners(f2, b2) & (low2 | high2)
    a3 = _nibble_of_winners(f3, b3) & (low3 | high3)
    in_byte = (quad & 3) * 2
    _store_pair_bits(column_bits, four, a0, low0, high0, in_byte, four_mask, BG, BQ)
    _store_pair_bits(column_bits, four + quads // 4, a1, low1, high1, in_byte, four_mask, BG, BQ)
    _store_pair_bits(column_bits, four + quads // 4 * 2, a2, low2, high2, in_byte, four_mask, BG, BQ)
    _store_pair_bits(column_bits, four + quads // 4 * 3, a3, low3, high3, in_byte, four_mask, BG, BQ)
    return a0, a1, a2, a3


@triton.jit
def _column_kernel(
    values,
    row_bits,
    column_bits,
    metadata,
    groups,
    quads,
    CHOOSE: tl.constexpr,
    WRITE_METADATA: tl.constexpr,
    INFINITY: tl.constexpr,
    NATIVE: tl.constexpr,
    BG: tl.constexpr,
    BQ: tl.constexpr,
):
    """One tile of BG groups of four rows times BQ groups of four columns."""
    quad_start, group_start = tl.program_id(0) * BQ, tl.program_id(1) * BG
    quad = quad_start + tl.arange(0, BQ)[None, :]
    group = group_start + tl.arange(0, BG)[:, None]
    mask = (quad < quads) & (group < groups)
    # 64-bit offsets up to the tile's first row, 32-bit ones within the tile.
    start = group_start.to(tl.int64) * 4 * quads
    row_bits += start // 4
    column_bits += start // 4
    four = quad_start // 4 + tl.arange(0, BQ // 4)[None, :]
    four_mask = (four < quads // 4) & (group < groups)
    four += tl.arange(0, BG)[:, None] * quads
    t0 = load_four(row_bits, column_bits, four, four_mask, not CHOOSE, BG, BQ)
    t1 = load_four(row_bits, column_bits, four + quads // 4, four_mask, not CHOOSE, BG, BQ)
    t2 = load_four(row_bits, column_bits, four + quads // 4 * 2, four_mask, not CHOOSE, BG, BQ)
    t3 = load_four(row_bits, column_bits, four + quads // 4 * 3, four_mask, not CHOOSE, BG, BQ)
    if CHOOSE:
        before = tl.arange(0, BG)[:, None] * 4 * quads
        a0, a1, a2, a3 = _choose(
            values + start, t0, t1, t2, t3, before, quad, quads, mask,
            column_bits, four, four_mask, INFINITY, NATIVE, BG, BQ,
        )  # fmt: skip
    else:
        a0, a1, a2, a3 = _alive(t0, quad), _alive(t1, quad), _alive(t2, quad), _alive(t3, quad)
    if WRITE_METADATA:
        first0, first1, second0, second1 = slot_places(a0, a1, a2, a3, 15)
        nibbles = spread(first0) | (spread(first1) << 1) | (spread(second0) << 2) | (spread(second1) << 3)
        group_block = group_start // 8 + tl.arange(0, BG // 8)[:, None, None, None]
        quad_block = quad_start + tl.arange(0, BQ // 4)[None, None, :, None] * 4
        word_mask = (group_block < groups // 8) & (quad_block < quads)
        _store_words(metadata, nibbles, group_block, quad_start, groups // 8, word_mask, BG, BQ)


def _launch(values, row_bits, column_bits, metadata, dtype, choose: bool, blocks: tuple[int, int, int]) -> None:
    rows, columns = row_bits.shape[0], row_bits.shape[1] * 8
    block_g, block_q, warps = blocks
    grid = (triton.cdiv(columns // 4, block_q), triton.cdiv(rows // 4, block_g))
    _column_kernel[grid](
        values.view(torch.int32) if choose else row_bits,
        row_bits.view(torch.uint16),
        column_bits,
        metadata.view(torch.int32) if metadata is not None else row_bits,
        rows // 4,
        columns // 4,
        CHOOSE=choose,
        WRITE_METADATA=metadata is not None,
        INFINITY=0x7F80 if dtype == torch.bfloat16 else 0x7C00,
        NATIVE=row_bits.is_cuda,
        BG=block_g,
        BQ=block_q,
        num_warps=warps,
    )


def choose_column(values_NC, row_bits, column_bits, metadata=None, *, blocks=(8, 64, 4)) -> None:
    """The second pruning by magnitude: writes `column_bits` and, where given, the backward operand's metadata.

    Args:
        values_NC: 16-bit, contiguous, 4-byte aligned; N a multiple of 4 (32 with metadata), K of 16 (64).
        metadata: uint8 `[N K / 8]` or None.
        blocks: groups of rows and of columns a program, and its warps.
    """
    _launch(values_NC, row_bits, column_bits, metadata, values_NC.dtype, True, blocks)


def column_metadata(row_bits, column_bits, metadata, *, blocks=(16, 64, 4)) -> None:
    """The backward operand's metadata for a given second pruning; N a multiple of 32, K of 64."""
    _launch(None, row_bits, column_bits, metadata, torch.bfloat16, False, blocks)
