"""Small functions on bitmasks of 2:4 weights; shared by the kernels.

A *nibble* has one bit for each of the four columns of a group: a word of a row's bitmask is eight nibbles, and most of
what is asked of a pattern is answered for all eight at once, with the word as it stands. Of a row's two kept values,
the *low* one is that of the lower bit of its nibble; both together are a *pair*, 32 bits with the low value in the low
half. Bitmasks are laid out as in `slope_megatron.sparsity.packing`.

These kernels decide which thread owns what. Their tensors' first axis has an element a thread; the others are registers
of that thread, and a last axis that is contiguous in memory is one load or store of up to 16 bytes. Triton gives an
axis to threads in just this order, so nothing moves between threads and no layout is converted in shared memory.

Only Triton's builtins are used, none of its jitted library functions: the interpreter is then chosen per kernel.
"""

import triton
import triton.language as tl


@triton.jit
def load_nibble(bits, group, mask):
    """The nibble of a group of four: two groups a byte, low half first."""
    byte = tl.load(bits + group // 2, mask=mask, other=0).to(tl.int32)
    return (byte >> (group % 2 * 4).to(tl.int32)) & 15


@triton.jit
def _byte_of(both, selector):
    """One byte of eight; with bit 3 of the selector its sign, eight times."""
    byte = (both >> ((selector & 7) * 8)) & 255
    return tl.where((selector & 8) != 0, (byte >> 7) * 255, byte)


@triton.jit
def permute_bytes(a, b, selector, NATIVE: tl.constexpr):
    """Byte k of the result is byte (selector >> 4 k) & 7 of the eight bytes (a, b): the `prmt` instruction.

    Where the selector's nibble has bit 3 set, it is that byte's sign eight times: 0 or 255. With (a, b) a table of
    eight bytes, this looks four nibbles up at once.
    """
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    both = (a.to(tl.int64) & 0xFFFFFFFF) | (b.to(tl.int64) << 32)
    wide = selector.to(tl.int64)
    result = _byte_of(both, wide) | (_byte_of(both, wide >> 4) << 8)
    result |= (_byte_of(both, wide >> 8) << 16) | (_byte_of(both, wide >> 12) << 24)
    return result.to(tl.int32)


@triton.jit
def merge_bits(mask, a, b, NATIVE: tl.constexpr):
    """Bits of a under the mask, of b elsewhere: one `lop3`, which is not found where the mask is a constant."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r", [mask, a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return (a & mask) | (b & ~mask)


@triton.jit
def higher_bits(kept):
    """The higher of the two bits of every nibble, each where it stands."""
    return kept & (kept - 0x11111111)


@triton.jit
def survivors(kept, survives, NATIVE: tl.constexpr):
    """Of the two bits of every nibble those that survive the second pruning.

    Args:
        kept: eight nibbles of a row's pattern.
        survives: 16 bits, two a nibble: whether the low and whether the high kept value survives.
    """
    zero = kept & 0
    # Two bits -> a byte: its low half says four times whether the low one survives, its high half whether just one.
    table = zero + 0x0FF0FF00
    even = permute_bytes(table, zero, survives & 0x3333, NATIVE)
    odd = permute_bytes(table, zero, (survives >> 2) & 0x3333, NATIVE)
    first = zero + 0x0F0F0F0F
    low, one = merge_bits(first, even, odd << 4, NATIVE), merge_bits(first, even >> 4, odd, NATIVE)
    # Less one, a nibble's lower bit is 0 and its higher bit still 1.
    return kept & (low ^ ((kept - 0x11111111) & one))


@triton.jit
def spread(nibble):
    """Bit j to the lowest bit of byte j."""
    return (nibble * 0x00204081) & 0x01010101


@triton.jit
def slot_indices(a1, a2, a3, ones):
    """Places of both slots of each column group, as bit planes: first bit 0, first bit 1, second bit 0, second bit 1.

    Args:
        a1..a3: whose column survives in the rows 1 to 3 of four; with row 0, which changes nothing, at most two do.
        ones: all columns' bits set.

    The indices differ and ascend, as the hardware wants. With fewer than two survivors the other slot takes an index
    that did not survive: index 0, or index 1 where 0 is the survivor.
    """
    return a1 & (a2 | a3), a2 & a3, (a3 | (a2 ^ ones)) & ones, a2 | a3
