"""The minimum-variance unbiased 2:4 estimator in the form that the kernel computes: sums and comparisons, no division.

Four numbers x_i with sizes a_i = |x_i|, halves `left` = a_0 + a_1 and `right` = a_2 + a_3:

    c    = min(sum of a / 2, sum of a without a_i, i = 0..3)       then p_i = min(1, a_i / c) add up to 2 (see `mvue`)
    kept = two indices, i with probability p_i
    x_i -> sign(x_i) max(a_i, c)                                    = x_i / p_i

The indices come from one random number t in [0, c) by systematic sampling: a comb of spacing c on the line on which the
a_i lie end to end. Its first tooth is at t from the left end; its second, c further, is at w = c - t from the right
end. Measured so, each tooth meets sums of numbers that come before it, and never one that has swallowed a larger one:

    right < w       both of the left pair    indices 0, 1
    left <= t       both of the right pair   indices 2, 3
    else            one of each              0 where t < a_0, else 1;    3 where w <= a_3, else 2

The two conditions exclude each other, and a zero is never drawn, in rounded arithmetic too. With at most one non-zero
c is 0 and both values are what they were; with two, c is the smaller and both are kept.
c itself is rounded to 16 bits at random, up or down so that its mean is c: the estimate stays unbiased. Of a group's
32-bit word the low 23 bits place the comb, its high bits round.
Numbers of 16 bits are computed with in fp32, in quarters so that no sum overflows; others in fp64.
"""

import torch

FRACTION_BITS = 23
# The dropped bits when fp32 becomes bf16 or fp16.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
# fp32 numbers times this have fp16's bits in their upper bits, subnormal ones too: the exponents' biases differ by 112.
HALF_SCALE = 2.0**-112
SMALLEST = 2.0**-149


def two_of_four(gradient: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[..., S/2]` in the gradient's type and indices int64 `[..., S/4, 2]`, ascending, of the estimate.

    A group that holds an infinity or NaN, or whose estimate is beyond the type's range, comes back as two NaN.

    Args:
        gradient: `[..., S]`, S a multiple of 4.
        words: random 32-bit words, int64 `[..., S/4]`.
    """
    groups = gradient.unflatten(-1, (-1, 4))
    wide = groups.float() if gradient.dtype in DROPPED_BITS else groups.double()
    a0, a1, a2, a3 = (wide.abs() * 0.25).unbind(-1)
    left, right = a0 + a1, a2 + a3
    total = left + right
    spacing = total * 0.5
    for others in (a1 + right, a0 + right, left + a3, left + a2):
        spacing = torch.minimum(spacing, others)
    share = 1.0 - (words & (2**FRACTION_BITS - 1)).to(wide.dtype) * 2.0**-FRACTION_BITS
    from_right = (share * spacing).clamp_min(SMALLEST)
    from_left = spacing - from_right
    both_left, both_right = from_right > right, from_left >= left
    first = torch.where(both_right, 2, torch.where(both_left | (from_left < a0), 0, 1))
    second = torch.where(both_left, 1, torch.where(both_right | (from_right <= a3), 3, 2))
    indices = torch.stack((first, second), -1)
    enlarged = _rounded_at_random(spacing * 4.0, words, gradient.dtype)
    kept = groups.gather(-1, indices)
    values = torch.copysign(torch.maximum(kept.abs(), enlarged[..., None]), kept)
    finite = total.isfinite() & enlarged.isfinite()
    return torch.where(finite[..., None], values, torch.nan).flatten(-2), indices


def _rounded_at_random(spacing: torch.Tensor, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`spacing` in `dtype`: up with the probability that keeps the mean, where 16 bits are asked for."""
    if dtype not in DROPPED_BITS:
        return spacing.to(dtype)
    dropped = DROPPED_BITS[dtype]
    scaled = spacing * HALF_SCALE if dtype == torch.float16 else spacing
    bits = scaled.view(torch.int32).long() + (words >> (32 - dropped))
    # 16 bits from here on; what does not fit them is beyond infinity, and so is a NaN.
    infinity = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    return (bits >> dropped).clamp_max(infinity).to(torch.int16).view(dtype)
