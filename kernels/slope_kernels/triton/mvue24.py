"""The unbiased 2:4 estimate of one group of four 16-bit numbers: the arithmetic of the `mvue` kernel.

Oracle and derivation: `slope_megatron.sparsity.mvue24`, equal to the bit: fp32 sums in the same order, no contracted
multiply-adds. Comparisons, selections and bit operations run at half the rate of additions, so they are what is saved:
about half of 67 instructions a group.
"""

import triton
import triton.language as tl

from slope_kernels.triton.bits import permute_bytes

NAN_SAFE = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=NAN_SAFE)


@triton.jit
def _rounded_at_random(spacing, poison, word, IS_BF16: tl.constexpr):
    """A 16-bit number, up or down at random, in the high half of a word; NaN where it or `poison` is not finite."""
    if IS_BF16:
        rounded = (spacing.to(tl.uint32, bitcast=True) + (word >> 16)).to(tl.float32, bitcast=True)
        return tl.fma(poison, 0.0, tl.fma(rounded, 0.0, rounded)).to(tl.int32, bitcast=True)
    # Times 2^-112, fp32's bits are fp16's, 13 bits up, subnormal numbers included.
    bits = ((spacing * 1.925929944387236e-34).to(tl.uint32, bitcast=True) + (word >> 19)) >> 13
    finite = (bits < 0x7C00) & (poison < float("inf"))
    return tl.where(finite, bits, 0x7FFF).to(tl.int32) << 16


@triton.jit
def _enlarged(pair, size, IS_BF16: tl.constexpr, NATIVE: tl.constexpr):
    """sign(x) max(|x|, size) of both 16-bit numbers of a word; NaN if one of the two is.

    Args:
        size: a positive number, as `_rounded_at_random` leaves it.
    """
    if NATIVE:
        if IS_BF16:
            return tl.inline_asm_elementwise(
                "{ .reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, $2; mov.b32 d, {h, h};"
                " max.NaN.xorsign.abs.bf16x2 $0, $1, d; }",
                "=r,r,r", [pair, size], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, $2; mov.b32 d, {h, h};"
            " max.NaN.xorsign.abs.f16x2 $0, $1, d; }",
            "=r,r,r", [pair, size], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    # Sizes of 16-bit numbers order like their bits.
    size = (size >> 16) & 0xFFFF
    low, high = tl.maximum(pair & 0x7FFF, size), tl.maximum((pair >> 16) & 0x7FFF, size)
    return low | (high << 16) | (pair & -2147450880)


@triton.jit
def _size(pair, HIGH: tl.constexpr, IS_BF16: tl.constexpr):
    """A quarter of the size of the 16-bit number in one half of a word."""
    if IS_BF16:
        # The interpreter converts subnormal numbers wrongly; their bits are right everywhere.
        value = ((pair & -65536) if HIGH else (pair << 16)).to(tl.float32, bitcast=True)
    else:
        value = ((pair >> 16) if HIGH else pair).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.abs(value * 0.25)


@triton.jit
def two_of_four(front, back, word, SHIFT: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr):
    """Pair of values of a group, and a word with its metadata nibble at bit SHIFT; see the oracle for the mathematics.

    Args:
        front, back: the group's first two and last two numbers.
    """
    a0, a1 = _size(front, False, IS_BF16), _size(front, True, IS_BF16)
    a2, a3 = _size(back, False, IS_BF16), _size(back, True, IS_BF16)
    left, right = a0 + a1, a2 + a3
    total = left + right
    others = _smaller(_smaller(a0, a1) + right, left + _smaller(a2, a3))
    spacing = _smaller(total * 0.5, others)
    share = 2.0 - ((word & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    # At least the smallest number there is; as bits, for Triton takes so small a constant for fp64.
    from_right = tl.maximum((share * spacing).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    from_left = spacing - from_right
    # Each choice at once as bytes to take (low half) and as metadata (high half).
    one_each = tl.where(from_left < a0, 0x0010, 0x0032 | (1 << SHIFT)) | tl.where(
        from_right <= a3, 0x7600 | (12 << SHIFT), 0x5400 | (8 << SHIFT)
    )
    choice = tl.where(
        from_right > right, 0x3210 | (4 << SHIFT), tl.where(from_left >= left, 0x7654 | (14 << SHIFT), one_each)
    )
    size = _rounded_at_random(spacing * 4.0, total, word, IS_BF16)
    return _enlarged(permute_bytes(front, back, choice, NATIVE), size, IS_BF16, NATIVE), choice
