"""What a training step does to each parameter: gradients added up, AdamW's update.

    accumulate   fp32 total += 16-bit gradient                    10 B moved an element
    adamw        clipping, both moments, decay, the master and the 16-bit weight in one pass
                 16 B read and 14 B written an element
Oracle: plain torch, in `slope_megatron.ops.update`.
"""

import math

import torch
import triton
import triton.language as tl

# Elements of a program of 4 warps: a thread moves 16 bytes at once, several times.
ACCUMULATED, UPDATED = 2048, 1024


@triton.jit
def _accumulate_kernel(total, gradient, elements, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < elements
    value = tl.load(total + place, mask=mask) + tl.load(gradient + place, mask=mask).to(tl.float32)
    tl.store(total + place, value, mask=mask)


@triton.jit
def _adamw_kernel(
    master,
    mean,
    square,
    weight,
    gradient,
    step,
    elements,
    coefficient,
    lr,
    decay,
    eps,
    beta1,
    rest1,
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    BLOCK: tl.constexpr,
):
    """`rest` is 1 - beta, `log_beta` its logarithm to base 2: both are exact on the host and not in fp32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < elements
    # In fp64: after one step, 1 - 0.999 would be known to three digits.
    count = tl.load(step).to(tl.float64)
    correction1 = (1.0 - tl.exp2(count * log_beta1)).to(tl.float32)
    correction2 = tl.sqrt((1.0 - tl.exp2(count * log_beta2)).to(tl.float32))
    g = tl.load(gradient + place, mask=mask) * coefficient
    m = beta1 * tl.load(mean + place, mask=mask) + rest1 * g
    v = beta2 * tl.load(square + place, mask=mask) + rest2 * g * g
    w = tl.load(master + place, mask=mask)
    w -= lr * decay * w
    w -= lr / correction1 * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(mean + place, m, mask=mask)
    tl.store(square + place, v, mask=mask)
    tl.store(master + place, w, mask=mask)
    tl.store(weight + place, w.to(weight.dtype.element_ty), mask=mask)


def _parts(elements: int) -> list[slice]:
    """A whole multiple of 16 elements, whose loads and stores are wide; the rest, if there is any."""
    whole = elements - elements % 16
    return [part for part in (slice(0, whole), slice(whole, elements)) if part.stop > part.start]


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf


def accumulate(total: torch.Tensor, gradient: torch.Tensor) -> None:
    """total += gradient; both contiguous, of one size."""
    total, gradient = total.view(-1), gradient.view(-1)
    for part in _parts(total.numel()):
        elements = part.stop - part.start
        grid = (triton.cdiv(elements, ACCUMULATED),)
        _accumulate_kernel[grid](total[part], gradient[part], elements, BLOCK=ACCUMULATED, num_warps=4)


def adamw(
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    step: torch.Tensor,
    *,
    coefficient: float,
    lr: float,
    decay: float,
    eps: float,
    beta1: float,
    beta2: float,
) -> None:
    """All but `step`, one number, flat and of one size; all fp32 but `weight`."""
    first, second = (beta1, 1.0 - beta1, _log2(beta1)), (beta2, 1.0 - beta2, _log2(beta2))
    for part in _parts(master.numel()):
        tensors = (tensor[part] for tensor in (master, mean, square, weight, gradient))
        elements = part.stop - part.start
        grid = (triton.cdiv(elements, UPDATED),)
        settings = (coefficient, lr, decay, eps, *first, *second)
        _adamw_kernel[grid](*tensors, step, elements, *settings, BLOCK=UPDATED, num_warps=4)
