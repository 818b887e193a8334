"""The metadata that says where kept values belong, in cuSPARSELt's layout for 16-bit types on sm_90.

One nibble a group of four: first index | second index << 2. An operand of R rows and G groups a row is cut into blocks
of 64 rows x 8 groups (256 bytes), group-major within a row block. Within a block the address of a nibble is, from the
highest bit down, r5 r4 r2 r1 r0 g1 g0 g2 r3 (r row, g group): found by setting one group at a time and compressing.
The layout is the library's own affair: `ops.custom_ops.layout` verifies it against the library's compressor before
it is used, and falls back to that compressor.

    row_metadata      of W^R from the row bitmask
    column_metadata   of the transposed W^{R,C} from both bitmasks
Both are permutations of bits, done on whole words: a step exchanges one bit of the position in a word with one bit of
which word it is, for all 32 bits of two words at once.
Oracle: `slope_megatron.sparsity.operand`.
"""

import torch
import triton
import triton.language as tl

from slope_kernels.triton.bits import merge_bits, permute_bytes, slot_indices, survivors


@triton.jit
def _nibbles_of_row(kept, NATIVE: tl.constexpr):
    """Metadata nibbles of eight groups from their eight row nibbles, of whose bits exactly two are set.

    From the kept bits k3 k2 k1 k0: first index = (not k0 and not k1, k1 and not k0), second = (k2 or k3, k3 or not k2).
    Its bits 0 and 2 are an `and` and an `or` of the same two words, which the majority of three computes at once.
    """
    above, choice = kept >> 1, 0x44444444
    even = (above & ~kept) | (choice & (above | ~kept))
    odd = (kept | (kept << 1)) ^ 0x22222222
    return merge_bits((kept & 0) + 0x55555555, even, odd, NATIVE)


@triton.jit
def _row_metadata_kernel(
    row_masks,
    metadata,
    group_blocks,
    NATIVE: tl.constexpr,
    BLOCKS: tl.constexpr,
    SETS: tl.constexpr,
):
    """A thread has the rows r and r + 8 of BLOCKS neighbouring blocks of eight groups: two words of each block.

    Half a warp writes 128 bytes of a block together, and two threads read neighbouring words of a row.
    """
    thread = tl.arange(0, 32 * SETS)
    pair = thread // 2 % 32
    block = (tl.program_id(0) * SETS + thread // 64 * 2 + thread % 2) * BLOCKS
    row_block = tl.program_id(1).to(tl.int64)
    offset = (row_block * 64 + pair // 8 * 16 + pair % 8) * group_blocks + block
    mask = (block < group_blocks)[:, None]
    words = row_masks + offset[:, None] + tl.arange(0, BLOCKS)[None, :]
    upper = _nibbles_of_row(tl.load(words, mask=mask), NATIVE)
    lower = _nibbles_of_row(tl.load(words + 8 * group_blocks, mask=mask), NATIVE)
    even, odd = _exchange(upper, lower, 4, 0x0F0F0F0F, NATIVE)
    # Groups 0 4 1 5 | 2 6 3 7.
    zero = even & 0
    pairs = tl.join(permute_bytes(even, odd, zero + 0x6420, NATIVE), permute_bytes(even, odd, zero + 0x7531, NATIVE))
    target = (row_block * group_blocks + block) * 64 + pair * 2
    target = target[:, None, None] + tl.arange(0, BLOCKS)[None, :, None] * 64 + tl.arange(0, 2)[None, None, :]
    tl.store(metadata + target, pairs, mask=mask[:, :, None])


def row_metadata(row_bits: torch.Tensor, metadata: torch.Tensor, *, sets: int = 16) -> None:
    """Write the metadata of W^R `[N, K]`; N a multiple of 64, K of 32.

    Args:
        row_bits: uint8 `[N, K/8]`, contiguous, 4-byte aligned.
        metadata: uint8 `[N K / 8]`.
        sets: warps of a program, each with a set of neighbouring blocks of 64 rows.
    """
    group_blocks = row_bits.shape[1] // 4
    blocks = 4 if group_blocks % 4 == 0 else 1
    grid = (triton.cdiv(group_blocks, sets * blocks), row_bits.shape[0] // 64)
    _row_metadata_kernel[grid](
        row_bits.view(torch.int32),
        metadata.view(torch.int32),
        group_blocks,
        NATIVE=row_bits.is_cuda,
        BLOCKS=blocks,
        SETS=sets,
        num_warps=sets,
    )


@triton.jit
def _nibbles_of_group(row_masks, column_masks, row, mask, WORDS: tl.constexpr, NATIVE: tl.constexpr):
    """Metadata nibbles of 32 columns of one group of four rows: word j has those of the columns 4 q + j, q in order.

    The group's first row is not read: the other three tell the indices.
    """
    a1 = _load_survivors(row_masks, column_masks, (row + 1) * WORDS, mask, NATIVE)
    a2 = _load_survivors(row_masks, column_masks, (row + 2) * WORDS, mask, NATIVE)
    a3 = _load_survivors(row_masks, column_masks, (row + 3) * WORDS, mask, NATIVE)
    p0, p1, p2, p3 = slot_indices(a1, a2, a3, -1)
    # Planes -> nibbles: first the lowest bit of the column with that of the plane, then the second ones.
    even01, odd01 = _exchange(p0, p1, 1, 0x55555555, NATIVE)
    even23, odd23 = _exchange(p2, p3, 1, 0x55555555, NATIVE)
    n0, n2 = _exchange(even01, even23, 2, 0x33333333, NATIVE)
    n1, n3 = _exchange(odd01, odd23, 2, 0x33333333, NATIVE)
    return n0, n1, n2, n3


@triton.jit
def _load_survivors(row_masks, column_masks, offset, mask, NATIVE: tl.constexpr):
    kept = tl.load(row_masks + offset, mask=mask)
    return survivors(kept, tl.load(column_masks + offset, mask=mask).to(tl.int32), NATIVE)


@triton.jit
def _exchange(a, b, shift: tl.constexpr, low: tl.constexpr, NATIVE: tl.constexpr):
    """Fields of `shift` bits, those under the mask `low` called even: (even ones of a and b, odd ones of a and b)."""
    mask = (a & 0) + low
    return merge_bits(mask, a, b << shift, NATIVE), merge_bits(mask, a >> shift, b, NATIVE)


@triton.jit
def _exchange_halves(a, b, NATIVE: tl.constexpr):
    zero = a & 0
    return permute_bytes(a, b, zero + 0x5410, NATIVE), permute_bytes(a, b, zero + 0x7632, NATIVE)


@triton.jit
def _exchange_bytes(a, b, NATIVE: tl.constexpr):
    zero = a & 0
    return permute_bytes(a, b, zero + 0x6240, NATIVE), permute_bytes(a, b, zero + 0x7351, NATIVE)


@triton.jit
def _words_of_groups(w0, w1, w2, w3, NATIVE: tl.constexpr):
    """The words r4 r2 = 00, 01, 10, 11 from those of the groups g2 g0 = 00, 01, 10, 11, as a last axis."""
    # Within a word a nibble's position is r4 r3 r2, and is to be g0 g2 r3.
    w0, w1 = _exchange_halves(w0, w1, NATIVE)
    w2, w3 = _exchange_halves(w2, w3, NATIVE)
    w0, w2 = _exchange_bytes(w0, w2, NATIVE)
    w1, w3 = _exchange_bytes(w1, w3, NATIVE)
    w0, w2 = _exchange(w0, w2, 4, 0x0F0F0F0F, NATIVE)
    w1, w3 = _exchange(w1, w3, 4, 0x0F0F0F0F, NATIVE)
    return _stack(w0, w2, w1, w3)


@triton.jit
def _stack(a, b, c, d):
    """Four tensors as a new last axis."""
    # A starred shape does not compile.
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), a.shape + (4,))  # noqa: RUF005


@triton.jit
def _column_metadata_kernel(
    row_masks,
    column_masks,
    metadata,
    group_blocks,
    WORDS: tl.constexpr,
    NATIVE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """A thread has 32 rows x 32 columns of W: half a block, 32 words of metadata."""
    word, group_block = tl.program_id(0) * THREADS + tl.arange(0, THREADS), tl.program_id(1)
    mask = word < WORDS
    start = group_block.to(tl.int64) * 32 * WORDS
    row_masks += start + word
    column_masks += start + word
    g0 = _nibbles_of_group(row_masks, column_masks, 0, mask, WORDS, NATIVE)
    g1 = _nibbles_of_group(row_masks, column_masks, 4, mask, WORDS, NATIVE)
    g2 = _nibbles_of_group(row_masks, column_masks, 8, mask, WORDS, NATIVE)
    g3 = _nibbles_of_group(row_masks, column_masks, 12, mask, WORDS, NATIVE)
    g4 = _nibbles_of_group(row_masks, column_masks, 16, mask, WORDS, NATIVE)
    g5 = _nibbles_of_group(row_masks, column_masks, 20, mask, WORDS, NATIVE)
    g6 = _nibbles_of_group(row_masks, column_masks, 24, mask, WORDS, NATIVE)
    g7 = _nibbles_of_group(row_masks, column_masks, 28, mask, WORDS, NATIVE)
    # Axes: thread, r4 r2, and then r1 r0 = 0..3; groups with g1 = 0 and 1 apart.
    even = _stack(
        _words_of_groups(g0[0], g1[0], g4[0], g5[0], NATIVE),
        _words_of_groups(g0[1], g1[1], g4[1], g5[1], NATIVE),
        _words_of_groups(g0[2], g1[2], g4[2], g5[2], NATIVE),
        _words_of_groups(g0[3], g1[3], g4[3], g5[3], NATIVE),
    )
    odd = _stack(
        _words_of_groups(g2[0], g3[0], g6[0], g7[0], NATIVE),
        _words_of_groups(g2[1], g3[1], g6[1], g7[1], NATIVE),
        _words_of_groups(g2[2], g3[2], g6[2], g7[2], NATIVE),
        _words_of_groups(g2[3], g3[3], g6[3], g7[3], NATIVE),
    )
    block = (word // 2).to(tl.int64) * group_blocks + group_block
    target = block * 64 + word % 2 * 32
    # 128 bytes a thread: passed through shared memory, so that neighbouring threads write neighbouring addresses.
    target = target[:, None] + tl.arange(0, 32)[None, :]
    tl.store(metadata + target, tl.reshape(tl.join(even, odd), (THREADS, 32)), mask=mask[:, None])


def column_metadata(
    row_bits: torch.Tensor,
    column_bits: torch.Tensor,
    metadata: torch.Tensor,
    *,
    threads: int = 32,
) -> None:
    """The backward operand's metadata for a given second pruning; N a multiple of 32, K of 64.

    Args:
        row_bits, column_bits: uint8 `[N, K/8]` and `[N, K/16]`, contiguous, 4-byte and 2-byte aligned.
        metadata: uint8 `[N K / 8]`.
    """
    rows, words = row_bits.shape[0], row_bits.shape[1] // 4
    _column_metadata_kernel[(triton.cdiv(words, threads), rows // 32)](
        row_bits.view(torch.int32),
        column_bits.view(torch.uint16),
        metadata.view(torch.int32),
        rows // 32,
        WORDS=words,
        NATIVE=row_bits.is_cuda,
        THREADS=threads,
        num_warps=threads // 32,
    )
