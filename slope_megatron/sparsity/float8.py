"""e4m3 with one scale a tensor, in plain torch: what the kernels must equal, and what a CPU run computes with.

    x  ~  q s      q in e4m3 (4 significant bits, largest 448), s = 2^p the smallest with amax(|x|) <= 448 s

A power of two costs at most one of e4m3's 18 binades and buys exactness: dividing by it rounds nothing, and q s is a
16-bit number again, so a product of rounded matrices in 16 bits with fp32 sums is the product of the e4m3 matrices.
A tensor with an infinity or a NaN becomes NaN throughout.
"""

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# The exponent of the smallest scale, for tensors of zeros.
LOWEST_POWER = -100
# An aimed scale wastes at most so many of e4m3's 18 binades.
SLACK = 4


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """s for the largest magnitude `amax`, a float32 scalar; NaN where that is not finite."""
    significand, exponent = torch.frexp(amax.float())
    # amax = significand 2^exponent with 0.5 <= significand < 1, and 448 = 0.875 2^9.
    power = exponent - 9 + (significand > 0.875)
    scale = torch.exp2(power.clamp(min=LOWEST_POWER).float())
    scale = torch.where(amax == 0, torch.exp2(torch.full_like(scale, LOWEST_POWER)), scale)
    return torch.where(torch.isfinite(amax), scale, torch.full_like(scale, float("nan")))


def aimed(scale: torch.Tensor, partner: torch.Tensor, target: int) -> torch.Tensor:
    """The scale whose product with `partner` is 2^target, if it is `scale` or at most SLACK binades more; else `scale`.

    A product whose scales multiply to a power that the host knows needs no second pass over its result.
    """
    wanted = 2.0**target / partner
    return torch.where((wanted >= scale) & (wanted <= scale * 2.0**SLACK), wanted, scale)


def quantize(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """q, e4m3 of x's shape, and s; a given scale that is too small saturates."""
    if scale is None:
        scale = scale_of(x.abs().amax())
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest values that e4m3 has with x's own scale, in x's dtype."""
    q, scale = quantize(x)
    return (q.float() * scale).to(x.dtype)


def scaled_mm(q_TS, w_RS, q_scale, w_scale, bias, dtype: torch.dtype) -> torch.Tensor:
    """Y `[T, R]` = s_q s_w Q W^T of e4m3 matrices, summed in float32 and rounded; then (+ bias)."""
    y_TR = ((q_TS.float() @ w_RS.float().t()) * (q_scale * w_scale)).to(dtype)
    return y_TR if bias is None else y_TR + bias
