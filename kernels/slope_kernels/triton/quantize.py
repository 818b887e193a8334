"""quantize: a 16-bit matrix -> e4m3 with one scale, row-major, transposed, or both from one reading.

T rows (tokens), S columns. x is near q * scale, the scale a power of two, the smallest with amax(|x|) <= 448 scale: so
multiplying by it is exact, and only q's own rounding (to nearest, ties to even) is left. With an aim, the scale that
makes the product with a partner's scale 2^target is taken instead, if it is at most SLACK binades larger.
    amax       x [T, S] -> the bits of its largest |x|                    2 B read an element
    quantize   x [T, S] -> q [T', S] and / or q^T [S, T'], and the scale  2 B read, 1 B written for each copy
    rescale    y [T, R] *= what the scales of both factors of a product call for (+ bias)   2 B read, 2 B written,
               or nothing where that is one
T' is T padded to what a product wants, with zeros. A matrix with an infinity or a NaN becomes NaN throughout, so that a
gradient that has overflowed stays visible. Oracle: `slope_megatron.sparsity.float8`.
"""

import torch
import triton
import triton.language as tl

# Programs of the amax kernel: several for each multiprocessor.
PROGRAMS = 4096
# An aimed scale wastes at most so many of e4m3's 18 binades.
SLACK: tl.constexpr = tl.constexpr(4)
# Rows and columns a program and its warps, by the copies that are wanted (row-major, transposed): the fastest tried.
BLOCKS = {(True, False): (16, 256, 4), (False, True): (128, 64, 8), (True, True): (128, 128, 8)}


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right)


@triton.jit
def _amax_kernel(x, amax, words, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Magnitudes of 16-bit floats order as their bits do, infinities and NaNs last. `x` points to pairs."""
    most = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        offset = (tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)) * BLOCK + tl.arange(0, BLOCK)
        pair = tl.load(x + offset, mask=offset < words, other=0)
        most = tl.maximum(most, tl.maximum(pair & 0x7FFF, (pair >> 16) & 0x7FFF))
    tl.atomic_max(amax, tl.reduce(most, 0, _larger), sem="relaxed")


@triton.jit
def _scales(bits, partner, target, AIMED: tl.constexpr, IS_BF16: tl.constexpr):
    """The scale and its inverse, from the bits of the largest magnitude; NaN where that is not finite."""
    if IS_BF16:
        wide = bits << 16
    else:
        wide = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    # 448 = 1.75 2^8: a significand over 1.75 takes one power more. Zeros, and what is almost one, stop at 2^-100.
    power = (wide >> 23) - 127 - 8 + ((wide & 0x7FFFFF) > 0x600000).to(tl.int32)
    power = tl.maximum(power, -100)
    if AIMED:
        wanted = target + 127 - (tl.load(partner).to(tl.int32, bitcast=True) >> 23)
        power = tl.where((wanted >= power) & (wanted <= power + SLACK), wanted, power)
    finite = wide < 0x7F800000
    scale = tl.where(finite, (127 + power) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (127 - power) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def _to_e4m3(value, NATIVE: tl.constexpr):
    """The e4m3 byte of a float32 that e4m3 can hold."""
    if NATIVE:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    # e4m3 has three of float32's 23 significand bits; its subnormals are float32's, 2^120 times as large.
    bits = (value * 7.52316384526264e-37).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    code = tl.where(value == value, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["target"])
def _quantize_kernel(
    x,
    amax,
    partner,
    target,
    scale,
    rows,
    columns,
    tokens,
    width,
    padded,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AIMED: tl.constexpr,
    IS_BF16: tl.constexpr,
    EVEN: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile of BLOCK_T x BLOCK_S; `rows` [T', S] and `columns` [S, T'] are the two copies."""
    found, inverse = _scales(tl.load(amax), partner, target, AIMED, IS_BF16)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, found)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    value = tl.load(x + (t * width + s), mask=None if EVEN else (t < tokens) & (s < width), other=None if EVEN else 0.0)
    code = _to_e4m3(value.to(tl.float32) * inverse, NATIVE)
    inside = None if EVEN else (t < padded) & (s < width)
    if ROWS:
        tl.store(rows + (t * width + s), code, mask=inside)
    if COLUMNS:
        tl.store(columns + (s.to(tl.int64) * padded + t), code, mask=inside)


@triton.jit
def _rescale_kernel(
    y,
    first,
    second,
    constant,
    bias,
    width,
    elements,
    BIASED: tl.constexpr,
    EVEN: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(first) * constant * tl.load(second)
    if BIASED | (factor != 1.0):
        for step in range(STEPS):
            offset = (tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)) * BLOCK + tl.arange(0, BLOCK)
            inside = None if EVEN else offset < elements
            value = tl.load(y + offset, mask=inside).to(tl.float32) * factor
            if BIASED:
                value += tl.load(bias + offset % width, mask=inside).to(tl.float32)
            tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


def amax_bits(
    x_TS: torch.Tensor, amax: torch.Tensor, *, programs: int = PROGRAMS, block: int = 2048, warps: int = 8
) -> None:
    """Raise `amax` (int32, one element) to the bits of the largest magnitude in x.

    Args:
        x_TS: 16-bit, contiguous, 4-byte aligned, an even number of elements.
        programs: at most so many, each taking its share in steps of `block` pairs.
    """
    words = x_TS.numel() // 2
    steps = triton.cdiv(words, block * programs)
    grid = (triton.cdiv(words, block * steps),)
    _amax_kernel[grid](x_TS.view(-1).view(torch.int32), amax, words, STEPS=steps, BLOCK=block, num_warps=warps)


def quantize(
    x_TS: torch.Tensor,
    amax: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    *,
    partner: torch.Tensor | None = None,
    target: int = 0,
    blocks: tuple[int, int, int] | None = None,
) -> None:
    """Write the copies and the scale.

    Args:
        x_TS: 16-bit, contiguous.
        amax: from `amax_bits`, of x or of a matrix that x's values are from.
        scale: float32, one element.
        rows: uint8 `[T', S]`; columns: uint8 `[S, T']`; None: leave it out.
        partner, target: a scale, float32, one element, and the power of two that the product of both is to be; None:
            no aim.
        blocks: rows and columns a program, and its warps; None: BLOCKS.
    Raises:
        ValueError: neither copy is wanted.
    """
    tokens, width = x_TS.shape
    if rows is not None:
        padded = rows.shape[0]
    elif columns is not None:
        padded = columns.shape[1]
    else:
        raise ValueError(
            "rows and columns are both None: one at least must be there; use amax_bits for the scale alone"
        )
    block_t, block_s, warps = blocks or BLOCKS[rows is not None, columns is not None]
    even = tokens % block_t == 0 and width % block_s == 0 and padded == tokens
    _quantize_kernel[(triton.cdiv(width, block_s), triton.cdiv(padded, block_t))](
        x_TS,
        amax,
        partner if partner is not None else scale,
        target,
        scale,
        rows if rows is not None else columns,
        columns if columns is not None else rows,
        tokens,
        width,
        padded,
        ROWS=rows is not None,
        COLUMNS=columns is not None,
        AIMED=partner is not None,
        IS_BF16=x_TS.dtype == torch.bfloat16,
        EVEN=even,
        NATIVE=x_TS.is_cuda,
        BLOCK_T=block_t,
        BLOCK_S=block_s,
        num_warps=warps,
    )


def rescale(
    y_TR: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    constant: float,
    bias: torch.Tensor | None,
    *,
    block: int = 4096,
) -> None:
    """y = first constant second y (+ bias), in place; y is not touched where that changes nothing.

    Args:
        y_TR: 16-bit, contiguous.
        first, second: float32, one element each; with `constant` powers of two, so that y is not rounded again.
        bias: `[R]` of y's dtype.
    """
    elements = y_TR.numel()
    # Few programs: mostly there is nothing to do, and then they cost little.
    steps = triton.cdiv(elements, block * PROGRAMS)
    programs = triton.cdiv(elements, block * steps)
    _rescale_kernel[(programs,)](
        y_TR,
        first,
        second,
        constant,
        bias if bias is not None else y_TR,
        y_TR.shape[1],
        elements,
        BIASED=bias is not None,
        EVEN=elements % (block * steps) == 0,
        STEPS=steps,
        BLOCK=block,
        num_warps=8,
    )
