"""Small functions on the patterns of a 4 x 4 tile of weights; shared by every kernel on 2:4 weights.

A *nibble* has one bit for each column j = 0..3 of the tile. Of a row's two kept values, the *low* one is that of the
lower bit of the row's nibble; both together are a *pair*, 32 bits with the low value in the low half. Four columns are
handled at once wherever possible: as bits of a nibble, or as bytes of a word. Bitmasks are laid out as in
`slope_megatron.sparsity.packing`.

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
def load_four(row_bits, column_bits, place, mask, BOTH: tl.constexpr, BG: tl.constexpr, BQ: tl.constexpr):
    """The patterns of four groups in a row, `[BG, BQ/4]`, repeated for each of the four: `[BG, BQ]`.

    Neighbours share a word of the bitmask: it is loaded once, and each takes its own bits by a constant shift.
    The low 16 bits are the groups' nibbles; above them, with BOTH, are two bits a group of who survives.
    """
    four = tl.load(row_bits + place, mask=mask).to(tl.int32)
    if BOTH:
        four |= tl.load(column_bits + place, mask=mask).to(tl.int32) << 16
    return tl.reshape(tl.broadcast_to(four[:, :, None], (BG, BQ // 4, 4)), (BG, BQ))


@triton.jit
def survivors(four, quad, low, high):
    """Of a row's lower and higher bit those that survive; `four` from `load_four` with BOTH."""
    alive = four >> ((quad & 3) * 2 + 16)
    return low * (alive & 1), high * ((alive >> 1) & 1)


@triton.jit
def split_nibble(kept):
    """The lower and the higher bit of a row's nibble, each where it stands."""
    high = kept & (kept - 1)
    return kept ^ high, high


@triton.jit
def spread(nibble):
    """Bit j to the lowest bit of byte j."""
    return (nibble * 0x00204081) & 0x01010101


@triton.jit
def permute_bytes(a, b, selector, NATIVE: tl.constexpr):
    """Byte k of the result is byte (selector >> 4 k) & 7 of the eight bytes (a, b): the `prmt` instruction."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    both = (a.to(tl.int64) & 0xFFFFFFFF) | (b.to(tl.int64) << 32)
    wide = selector.to(tl.int64)
    result = (both >> ((wide & 7) * 8)) & 255
    result |= ((both >> (((wide >> 4) & 7) * 8)) & 255) << 8
    result |= ((both >> (((wide >> 8) & 7) * 8)) & 255) << 16
    result |= ((both >> (((wide >> 12) & 7) * 8)) & 255) << 24
    return result.to(tl.int32)


@triton.jit
def expand(pair, low, high, NATIVE: tl.constexpr):
    """A pair at its columns: columns 0 and 1 in one word, 2 and 3 in another; zero where neither nibble has the column.

    The selector has a byte a column: 0x10 the low value's bytes, 0x32 the high one's, 0x44 two bytes of the zero.
    """
    selector = 0x44444444 - 0x34 * spread(low) - 0x12 * spread(high)
    zero = pair & 0
    return permute_bytes(pair, zero, selector, NATIVE), permute_bytes(pair, zero, selector >> 16, NATIVE)


@triton.jit
def slot_places(a0, a1, a2, a3, ones):
    """Places of both slots of each column group, as bit planes: first bit 0, first bit 1, second bit 0, second bit 1.

    Args:
        a0..a3: whose column survives in the rows 0..3 of the tile; at most two of the four in each column.
        ones: all columns' bits set.

    The places differ and ascend, as the hardware wants. With fewer than two survivors the other slot sits on a place
    that did not survive: place 0, or place 1 where 0 is the survivor.
    """
    return a1 & (a2 | a3), a2 & a3, (a3 | (a2 ^ ones)) & ones, a2 | a3
