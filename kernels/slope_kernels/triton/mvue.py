"""mvue: dY [T, N] -> the operand of its unbiased 2:4 estimate, transposed: P(dY)^T [N, T], in one pass.

T tokens, N out. A group is four tokens of one output, a quad four groups: the words of one Philox block.
    values     [N, S/2]     two kept values a group, 32 bits; S is T padded with zeros
    metadata   [N S / 8]    where they belong, in cuSPARSELt's sm_90 layout (see `metadata`) or in CUTLASS's
Traffic: 2 B read, 1 + 1/8 B written an element. A program's loads are issued in three waves, between which it computes:
the assembler decides so, whatever their order here.
Oracle: `slope_megatron.sparsity.mvue24`, to the bit: fp32 in the same order, no contracted multiply-adds; for the
metadata `slope_megatron.sparsity.operand` and `operand_cutlass`.
"""

import torch
import triton
import triton.language as tl

from slope_kernels.triton.bits import permute_bytes
from slope_kernels.triton.mvue24 import two_of_four
from slope_kernels.triton.philox import philox

# Of the generator, as `slope_megatron.sparsity.mvue_rng` has it.
ROUNDS = tl.constexpr(7)


@triton.jit
def _load(pointer, token, tokens, EVEN: tl.constexpr):
    """A row of dY, two outputs a word; zeros past the last token."""
    if EVEN:
        return tl.load(pointer)
    return tl.load(pointer, mask=token < tokens, other=0)


@triton.jit
def _words_from(index, s0, s1, k0, k1):
    """The four words of the block in which word `index` lies."""
    block = index >> 2
    return philox(block.to(tl.uint32), (block >> 32).to(tl.uint32), s0, s1, k0, k1, ROUNDS)


@triton.jit
def _word_at(index, s0, s1, k0, k1):
    """Word `index` alone: where T is no multiple of 16, a quad's words come from two blocks."""
    w0, w1, w2, w3 = _words_from(index, s0, s1, k0, k1)
    lane = index & 3
    return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))


@triton.jit
def _quad_words(streams, words, quad, groups, k0, k1, WHOLE_BLOCKS: tl.constexpr, Q: tl.constexpr):
    """The words of each quad's four groups, of the 32 outputs whose streams begin at `streams`."""
    pointer = streams + tl.arange(0, 32)[None, :]
    s0 = tl.load(pointer).to(tl.uint32, bitcast=True)
    s1 = tl.load(pointer + words).to(tl.uint32, bitcast=True)
    # Loaded for every quad, so that the compiler lays all that follows out as it does dY.
    row = tl.load(tl.broadcast_to(pointer + 2 * words, (Q, 32)))
    index = row.to(tl.int64) * groups + quad * 4
    if WHOLE_BLOCKS:
        return _words_from(index, s0, s1, k0, k1)
    w0, w1 = _word_at(index, s0, s1, k0, k1), _word_at(index + 1, s0, s1, k0, k1)
    w2, w3 = _word_at(index + 2, s0, s1, k0, k1), _word_at(index + 3, s0, s1, k0, k1)
    return w0, w1, w2, w3


@triton.jit
def _interleave(left, right, Q: tl.constexpr):
    """Numbers of even and of odd outputs -> of all, [Q, 64]."""
    return tl.reshape(tl.join(left, right), (Q, 64))


@triton.jit
def _group(
    pointer, token, tokens, stride, left_word, right_word,
    SHIFT: tl.constexpr, EVEN: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Pairs and choices of the four tokens from `token` on, of two neighbouring outputs."""
    x0 = _load(pointer, token, tokens, EVEN)
    x1 = _load(pointer + stride, token + 1, tokens, EVEN)
    x2 = _load(pointer + 2 * stride, token + 2, tokens, EVEN)
    x3 = _load(pointer + 3 * stride, token + 3, tokens, EVEN)
    lower, upper = (x0 & 0) + 0x5410, (x0 & 0) + 0x7632
    front, back = permute_bytes(x0, x1, lower, NATIVE), permute_bytes(x2, x3, lower, NATIVE)
    left, left_choice = two_of_four(front, back, left_word, SHIFT, IS_BF16, NATIVE)
    front, back = permute_bytes(x0, x1, upper, NATIVE), permute_bytes(x2, x3, upper, NATIVE)
    right, right_choice = two_of_four(front, back, right_word, SHIFT, IS_BF16, NATIVE)
    return _interleave(left, right, Q), _interleave(left_choice, right_choice, Q)


@triton.jit
def _store_values(values, p0, p1, p2, p3, row_block, quad_start, quads, EVEN: tl.constexpr, Q: tl.constexpr):
    """Pairs [Q, 64] of a quad's four groups, transposed: 16 bytes a quad."""
    fours = tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (Q, 64, 4))
    words = tl.reshape(tl.permute(fours, (1, 0, 2)), (64, Q * 4))
    word = quad_start * 4 + tl.arange(0, Q * 4)[None, :]
    row = row_block.to(tl.int64) * 64 + tl.arange(0, 64)[:, None]
    offset = row * (quads * 4) + word
    if EVEN:
        tl.store(values + offset, words)
    else:
        tl.store(values + offset, words, mask=word < quads * 4)


@triton.jit
def _store_metadata(
    metadata, nibbles, row_block, quad_start, quads, EVEN: tl.constexpr, NATIVE: tl.constexpr, Q: tl.constexpr
):
    """Metadata of 64 rows x Q quads; byte j of `nibbles` [Q, 64] is the nibble of a quad's group j.

    Of a group's number in a block, bits 1 and 0 are j and bit 2 is the quad's: its lowest.
    """
    rows = tl.permute(tl.reshape(nibbles, (Q, 4, 2, 8)), (0, 1, 3, 2))
    low, high = tl.split(rows)
    pairs = tl.permute(tl.reshape(low | (high << 4), (Q // 2, 2, 4, 8)), (0, 2, 3, 1))
    even, odd = tl.split(pairs)
    zero = even & 0
    first = permute_bytes(even, odd, zero + 0x5140, NATIVE)
    second = permute_bytes(even, odd, zero + 0x7362, NATIVE)
    words = tl.reshape(tl.join(first, second), (Q // 2, 64))
    block = quad_start // 2 + tl.arange(0, Q // 2)[:, None]
    offset = (row_block.to(tl.int64) * (quads // 2) + block) * 64 + tl.arange(0, 64)[None, :]
    if EVEN:
        tl.store(metadata + offset, words)
    else:
        tl.store(metadata + offset, words, mask=block < quads // 2)


@triton.jit
def _store_metadata_cutlass(
    metadata,
    nibbles,
    row_block,
    row_blocks,
    quad_start,
    quads,
    EVEN: tl.constexpr,
    NATIVE: tl.constexpr,
    Q: tl.constexpr,
):
    """The same in CUTLASS's order: a word has a quad's groups of row r, then those of r + 8.

    Of a group's number in a block, bits 3 and 2 are the quad's lowest two; blocks of one group number come row by row.
    """
    rows = tl.permute(tl.reshape(nibbles, (Q, 4, 2, 8)), (0, 1, 3, 2))
    low, high = tl.split(rows)
    # Byte j has group j of both rows: bring each row's four nibbles together.
    both = low | (high << 4)
    moved = (both ^ (both >> 4)) & 0x00F000F0
    both = both ^ (moved | (moved << 4))
    both = permute_bytes(both, both & 0, (both & 0) + 0x3120, NATIVE)
    # Axes: block, g3, g2, r54, r210 -> block, r54, g2, r210, g3.
    ordered = tl.permute(tl.reshape(both, (Q // 4, 2, 2, 4, 8)), (0, 3, 2, 4, 1))
    words = tl.reshape(ordered, (Q // 4, 128))
    block = quad_start // 4 + tl.arange(0, Q // 4)[:, None]
    offset = (block.to(tl.int64) * row_blocks + row_block) * 128 + tl.arange(0, 128)[None, :]
    if EVEN:
        tl.store(metadata + offset, words)
    else:
        tl.store(metadata + offset, words, mask=block < quads // 4)


@triton.jit
def _mvue_kernel(
    dy,
    key,
    streams,
    values,
    metadata,
    tokens,
    groups,
    quads,
    stride: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr,
    CUTLASS: tl.constexpr,
    Q: tl.constexpr,
):
    """64 outputs x Q quads of tokens; values and metadata are 32-bit words."""
    row_block, quad_start = tl.program_id(0), tl.program_id(1) * Q
    couple = row_block * 32 + tl.arange(0, 32)
    quad = (quad_start + tl.arange(0, Q))[:, None]
    k0, k1 = tl.load(key).to(tl.uint32, bitcast=True), tl.load(key + 1).to(tl.uint32, bitcast=True)
    first = streams + row_block * 32
    l0, l1, l2, l3 = _quad_words(first, 2 * stride, quad, groups, k0, k1, WHOLE_BLOCKS, Q)
    r0, r1, r2, r3 = _quad_words(first + stride, 2 * stride, quad, groups, k0, k1, WHOLE_BLOCKS, Q)
    # 64-bit offsets up to the first token, 32-bit ones within the tile; a word is two outputs.
    dy += quad_start.to(tl.int64) * 16 * stride
    pointer = dy + (tl.arange(0, Q)[:, None] * (16 * stride) + couple[None, :])
    token = quad * 16
    four = 4 * stride
    p0, n0 = _group(pointer, token, tokens, stride, l0, r0, 16, EVEN, IS_BF16, NATIVE, Q)
    p1, n1 = _group(pointer + four, token + 4, tokens, stride, l1, r1, 24, EVEN, IS_BF16, NATIVE, Q)
    p2, n2 = _group(pointer + 2 * four, token + 8, tokens, stride, l2, r2, 16, EVEN, IS_BF16, NATIVE, Q)
    p3, n3 = _group(pointer + 3 * four, token + 12, tokens, stride, l3, r3, 24, EVEN, IS_BF16, NATIVE, Q)
    _store_values(values, p0, p1, p2, p3, row_block, quad_start, quads, EVEN, Q)
    nibbles = permute_bytes(n0 | n1, n2 | n3, (n0 & 0) + 0x7632, NATIVE)
    if CUTLASS:
        row_blocks = tl.num_programs(0)
        _store_metadata_cutlass(metadata, nibbles, row_block, row_blocks, quad_start, quads, EVEN, NATIVE, Q)
    else:
        _store_metadata(metadata, nibbles, row_block, quad_start, quads, EVEN, NATIVE, Q)


def mvue_operand(
    dy_TN: torch.Tensor,
    key: torch.Tensor,
    streams: torch.Tensor,
    operand: torch.Tensor,
    *,
    for_cutlass: bool = False,
    quads: int = 8,
    warps: int = 4,
    registers: int = 64,
) -> None:
    """Write the operand of P(dY)^T `[N, S]`, S the operand's columns: T padded to a multiple of 64.

    Args:
        dy_TN: 16-bit, contiguous; N a multiple of 64.
        key: int32 `[2]`, the generator's key of this micro-batch.
        streams: int32 `[3, 2, N/2]`: the two words of each output's weight's name, and its row in the whole weight;
            of the even outputs, then of the odd ones.
        operand: uint8 `[9/8 N S]`, values, then metadata.
        for_cutlass: the metadata in CUTLASS's order, else in cuSPARSELt's.
        quads: times 16 tokens a program, a multiple of 4; warps of a program; registers of a thread at most, without
            which the compiler takes so many that too few programs share a processor. The defaults were the fastest on
            an H200, with cuSPARSELt's metadata.
    """
    tokens, rows = dy_TN.shape
    columns = operand.numel() * 8 // 9 // rows
    size = rows * columns
    groups = triton.cdiv(tokens, 4)
    grid = (rows // 64, triton.cdiv(columns, 16 * quads))
    _mvue_kernel[grid](
        dy_TN.view(torch.int32),
        key,
        streams,
        operand[:size].view(torch.int32),
        operand[size:].view(torch.int32),
        tokens,
        groups,
        columns // 16,
        rows // 2,
        WHOLE_BLOCKS=groups % 4 == 0,
        EVEN=tokens % (16 * quads) == 0,
        IS_BF16=dy_TN.dtype == torch.bfloat16,
        NATIVE=dy_TN.is_cuda,
        CUTLASS=for_cutlass,
        Q=quads,
        num_warps=warps,
        enable_fp_fusion=False,
        maxnreg=registers,
    )
