"""The second pruning: of the kept weights, the two largest of every four rows of a column -> the column bitmask.

N out, K in, C = K/2 kept per row.
    values       [N, C]         16 bits; 1 B read a weight
    row_bits     [N, K/8]       1/8 B read
    column_bits  [N, C/8]       1/16 B written
Weights are compared two at a time, in the halves of a word: each row's values are brought to their columns, a weight
that the row dropped becomes zero, below every kept one, and the signs of differences say who comes first.
Oracle: `slope_megatron.sparsity.pattern.column_pattern`.
"""

import torch
import triton
import triton.language as tl

from slope_kernels.triton.bits import higher_bits, permute_bytes


@triton.jit
def _scores(pair, NATIVE: tl.constexpr, IS_BF16: tl.constexpr):
    """Ranks of the two values of a pair: the bits of their magnitudes, which order like the numbers, plus one.

    Infinity and NaN count as the largest finite number.
    """
    if NATIVE and IS_BF16:
        smaller = tl.inline_asm_elementwise(
            "{ .reg .b32 t; abs.bf16x2 t, $1; min.bf16x2 $0, t, $2; }",
            "=r,r,r", [pair, (pair & 0) + 0x7F7F7F7F], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif NATIVE:
        smaller = tl.inline_asm_elementwise(
            "{ .reg .b32 t; abs.f16x2 t, $1; min.f16x2 $0, t, $2; }",
            "=r,r,r", [pair, (pair & 0) + 0x7BFF7BFF], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        most = 0x7F7F if IS_BF16 else 0x7BFF
        low, high = pair & 0x7FFF, (pair >> 16) & 0x7FFF
        smaller = tl.where(low > most, most, low) | (tl.where(high > most, most, high) << 16)
    return smaller + 0x00010001


@triton.jit
def _below(a, b, NATIVE: tl.constexpr, IS_BF16: tl.constexpr):
    """Where a < b, in both halves of a word of scores: the signs of a - b, bits 15 and 31; other bits are anything.

    Scores are non-negative numbers of the values' own type when read as such, so the difference is one instruction.
    """
    if NATIVE and IS_BF16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $2, $3, $1;",
            "=r,r,r,r", [a, b, (a & 0) - 0x407F4080], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    if NATIVE:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $2, $3, $1;",
            "=r,r,r,r", [a, b, (a & 0) - 0x43FF4400], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    # Scores leave bit 15 free: with it set the low half does not borrow from the high one.
    return ~((a | -0x7FFF8000) - b)


@triton.jit
def _selectors(kept, j: tl.constexpr, NATIVE: tl.constexpr):
    """For the columns j of four groups: the bytes that take their values out of a pair, a byte a group.

    0x10 takes the low value, 0x32 the high one, and 0x99 the sign of a byte that has none: zero. Which it is follows
    from the three lower bits of a nibble, since exactly two are set: a table of eight, 0 and 7 unused, for each j.
    """
    if j == 0:
        lower, upper = 0x10991099, -0x6666EF67
    elif j == 1:
        lower, upper = 0x32109999, -0x66EF6667
    elif j == 2:
        lower, upper = -0x66666667, -0x66CDCDF0
    else:
        lower, upper = -0x66CDCD67, -0x666666CE
    zero = kept & 0
    return permute_bytes(zero + lower, zero + upper, kept & 0x7777, NATIVE)


@triton.jit
def _at_column(pairs, kept, j: tl.constexpr, NATIVE: tl.constexpr):
    """Scores of one row at the columns 4 q + j: two groups a word, q even and odd.

    Args:
        pairs: scores of the even and of the odd groups, each `[T, 2, 2]`: thread, half of its columns, pair of groups.
        kept: the row's pattern, 16 bits a half, `[T, 2]`.
    """
    chosen = _selectors(kept, j, NATIVE) | 0x44004400
    chosen = chosen[:, :, None] >> (tl.arange(0, 2) * 16)[None, None, :]
    return permute_bytes(pairs[0], pairs[1], chosen, NATIVE)


@triton.jit
def _majority(a, b, c):
    return (a & b) | (a & c) | (b & c)


@triton.jit
def _losers(s0, s1, s2, s3, NATIVE: tl.constexpr, IS_BF16: tl.constexpr):
    """All but the two highest of four rows, the earlier of equals first: bits 15 and 31 say so for two columns.

    A row loses when at least two of the three others come before it.
    """
    b01, b02, b03 = _below(s0, s1, NATIVE, IS_BF16), _below(s0, s2, NATIVE, IS_BF16), _below(s0, s3, NATIVE, IS_BF16)
    b12, b13, b23 = _below(s1, s2, NATIVE, IS_BF16), _below(s1, s3, NATIVE, IS_BF16), _below(s2, s3, NATIVE, IS_BF16)
    return (
        _majority(b01, b02, b03),
        _majority(~b01, b12, b13),
        _majority(~b02, ~b12, b23),
        _majority(~b03, ~b13, ~b23),
    )


@triton.jit
def _column_bits(losers, j: tl.constexpr, NATIVE: tl.constexpr):
    """Signs of the words of the columns j -> their bits, of group q = 4 q2 + 2 q1 + q0 in nibble (q0 q2 q1)."""
    first, second = tl.split(tl.permute(losers, (0, 2, 1)))
    signs = permute_bytes(first, second, (first & 0) + 0xFBD9, NATIVE)
    return signs & (0x01010101 << (tl.arange(0, 2) * 4 + j))[None, :]


@triton.jit
def _kept_in_order(kept):
    """Nibbles q = 4 q2 + 2 q1 + q0 of a word to the positions (q0 q2 q1)."""
    swapped = (kept ^ (kept >> 4)) & 0x00F000F0
    kept = kept ^ swapped ^ (swapped << 4)
    swapped = (kept ^ (kept >> 8)) & 0x0000FF00
    return kept ^ swapped ^ (swapped << 8)


@triton.jit
def _survivor_bits(kept, lost):
    """Two bits a group: whether the low and whether the high kept value is not lost; 16 bits for eight groups."""
    kept = _kept_in_order(kept)
    high = higher_bits(kept)
    # A nibble with one bit set or none: adding 7 sets its highest bit if there was one.
    low_alive = ((kept ^ high) & ~lost) + 0x77777777
    high_alive = (high & ~lost) + 0x77777777
    two = ((low_alive >> 3) & 0x11111111) | ((high_alive >> 2) & 0x22222222)
    # Places (q0 q2 q1) of nibbles: the odd groups' bits go beside those of the even ones.
    return two | (two >> 14)


@triton.jit
def _choose_kernel(
    values, row_masks, column_masks, words, tiles, NATIVE: tl.constexpr, IS_BF16: tl.constexpr, THREADS: tl.constexpr
):
    """A thread has four rows x 32 columns: in each row eight pairs and one word of the bitmask."""
    tile = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    mask = tile < tiles
    word, group = tile % words, tile // words
    offset = group.to(tl.int64) * 4 * words + word
    row_masks += offset
    k0 = tl.load(row_masks, mask=mask)
    k1 = tl.load(row_masks + words, mask=mask)
    k2 = tl.load(row_masks + 2 * words, mask=mask)
    k3 = tl.load(row_masks + 3 * words, mask=mask)
    values += (offset * 8)[:, None, None] + (tl.arange(0, 2) * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    p0 = _load_scores(values, mask, NATIVE, IS_BF16, THREADS)
    p1 = _load_scores(values + 8 * words, mask, NATIVE, IS_BF16, THREADS)
    p2 = _load_scores(values + 16 * words, mask, NATIVE, IS_BF16, THREADS)
    p3 = _load_scores(values + 24 * words, mask, NATIVE, IS_BF16, THREADS)
    halves = (tl.arange(0, 2) * 16)[None, :]
    h0, h1, h2, h3 = k0[:, None] >> halves, k1[:, None] >> halves, k2[:, None] >> halves, k3[:, None] >> halves
    lost0, lost1, lost2, lost3 = h0 & 0, h1 & 0, h2 & 0, h3 & 0
    for j in tl.static_range(4):
        s0 = _at_column(p0, h0, j, NATIVE)
        s1 = _at_column(p1, h1, j, NATIVE)
        s2 = _at_column(p2, h2, j, NATIVE)
        s3 = _at_column(p3, h3, j, NATIVE)
        s0, s1, s2, s3 = _losers(s0, s1, s2, s3, NATIVE, IS_BF16)
        lost0 |= _column_bits(s0, j, NATIVE)
        lost1 |= _column_bits(s1, j, NATIVE)
        lost2 |= _column_bits(s2, j, NATIVE)
        lost3 |= _column_bits(s3, j, NATIVE)
    column_masks += offset
    _store_bits(column_masks, k0, lost0, mask)
    _store_bits(column_masks + words, k1, lost1, mask)
    _store_bits(column_masks + 2 * words, k2, lost2, mask)
    _store_bits(column_masks + 3 * words, k3, lost3, mask)


@triton.jit
def _load_scores(values, mask, NATIVE: tl.constexpr, IS_BF16: tl.constexpr, THREADS: tl.constexpr):
    """Scores of the even and of the odd groups of a row, `[T, 2, 2]` each."""
    scores = _scores(tl.load(values, mask=mask[:, None, None]), NATIVE, IS_BF16)
    return tl.split(tl.reshape(scores, (THREADS, 2, 2, 2)))


@triton.jit
def _store_bits(column_masks, kept, lost, mask):
    first, second = tl.split(lost)
    tl.store(column_masks, _survivor_bits(kept, first | second).to(tl.uint16), mask=mask)


def choose_column(
    values_NC: torch.Tensor, row_bits: torch.Tensor, column_bits: torch.Tensor, *, threads: int = 32
) -> None:
    """The second pruning by magnitude; N a multiple of 4, K of 32.

    Args:
        values_NC: 16-bit, contiguous, 4-byte aligned.
        row_bits, column_bits: uint8 `[N, K/8]` and `[N, K/16]`, contiguous, 4-byte and 2-byte aligned.
    """
    rows, words = row_bits.shape[0], row_bits.shape[1] // 4
    tiles = rows // 4 * words
    _choose_kernel[(triton.cdiv(tiles, threads),)](
        values_NC.view(torch.int32),
        row_bits.view(torch.int32),
        column_bits.view(torch.uint16),
        words,
        tiles,
        NATIVE=row_bits.is_cuda,
        IS_BF16=values_NC.dtype == torch.bfloat16,
        THREADS=threads,
        num_warps=threads // 32,
    )
