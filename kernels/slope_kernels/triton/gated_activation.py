"""gated_activation: the gradient of f(gate) up, both halves in one pass.

T tokens, F width of the MLP; x [T, 2F] = [gate | up], to which b [2F] may be added. Each activation is f(g) = g s(g):
    dX [T, 2F] = [dY up (s + g s')(gate) | dY gate s(gate)]         6 B read and 4 B written for each element of dY
        silu        s = sigmoid(g)                                  s' = s (1 - s)
        gelu        s = normal distribution function of g           s' = exp(-g^2 / 2) / sqrt(2 pi)
        gelu_tanh   s = sigmoid(2 u), u = sqrt(2 / pi) (g + 0.044715 g^3)   s' = 2 s (1 - s) du/dg
fp32 inside, one rounding. Oracle: `slope_megatron.ops.custom_ops.gated_activation.gradient`.
"""

import torch
import triton
import triton.language as tl

# Columns of a program: each of its threads reads 16 bytes of gate, of up and of dY, and writes as many of both halves.
BLOCK, WARPS = 1024, 4


@triton.jit
def _share_and_slope(g, ACTIVATION: tl.constexpr):
    """s(g) and s'(g), see the module."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = tl.exp(-0.5 * g * g) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * g * (1.0 + 0.044715 * g * g)))
        slope = share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        tl.static_assert(ACTIVATION == "silu")
        share = 1.0 / (1.0 + tl.exp(-g))
        slope = share * (1.0 - share)
    return share, slope


@triton.jit
def _gradient_kernel(
    dy, x, bias, dx, width, blocks, ACTIVATION: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK columns of one token; programs that run together have neighbouring ones."""
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x += token * 2 * width
    gate = tl.load(x + column, mask=inside).to(tl.float32)
    up = tl.load(x + width + column, mask=inside).to(tl.float32)
    gradient = tl.load(dy + token * width + column, mask=inside).to(tl.float32)
    if BIASED:
        gate += tl.load(bias + column, mask=inside).to(tl.float32)
        up += tl.load(bias + width + column, mask=inside).to(tl.float32)
    share, slope = _share_and_slope(gate, ACTIVATION)
    dx += token * 2 * width
    tl.store(dx + column, (gradient * up * (share + gate * slope)).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + width + column, (gradient * gate * share).to(dx.dtype.element_ty), mask=inside)


def gradient(
    dy_TF: torch.Tensor, x_TG: torch.Tensor, bias_G: torch.Tensor | None, dx_TG: torch.Tensor, activation: str
) -> None:
    """Write dX; G = 2F, all of them contiguous, of at most 32 bits a number.

    Args:
        activation: silu, gelu or gelu_tanh.
    """
    tokens, width = dy_TF.shape
    blocks = triton.cdiv(width, BLOCK)
    _gradient_kernel[(tokens * blocks,)](
        dy_TF,
        x_TG,
        bias_G if bias_G is not None else x_TG,
        dx_TG,
        width,
        blocks,
        ACTIVATION=activation,
        BIASED=bias_G is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
