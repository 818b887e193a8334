"""cross_entropy: what a loss needs of its logits, and their gradient, in one pass each.

T tokens, V entries of the vocabulary, or a rank's part of it; logits z [T, V], labels y [T].
    statistics   n = log sum exp(z) and z[y] in fp32; of a y outside 0..V-1, 0             2 B read a 16-bit logit
    gradient     dz = ((1 + 2 c n) exp(z - n) - [y]) w, n and w [T], c a z-loss' number;   2 B read, 2 B written
                 dz may be z itself
fp32 inside, one rounding. As in torch, a row of -inf has n = -inf, one with inf has inf, and NaN spoils its row.
Oracle: `slope_megatron.ops.custom_ops.cross_entropy`.
"""

import torch
import triton
import triton.language as tl

# Neighbours that a lane reads at once: 16 bytes of 16-bit logits.
VECTOR: tl.constexpr = tl.constexpr(8)
# Lanes and warps of the program that reads a row: two lanes a thread.
LANES, ROW_WARPS = 512, 8
# Columns and warps of a program of the gradient.
BLOCK, WARPS = 2048, 4


@triton.jit
def _shift(largest):
    """What is subtracted from the logits before exp, so that none overflows; infinities cannot be."""
    return tl.where((largest == float("inf")) | (largest == float("-inf")), 0.0, largest)


@triton.jit
def _statistics_kernel(logits, labels, normalizer, chosen, width, STEPS: tl.constexpr, LANES: tl.constexpr):
    """One row. Each lane keeps the largest of its logits and the sum of exp(logit - largest); they meet at the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    places = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for step in range(STEPS):
        column = step * LANES * VECTOR + places
        logit = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(logit, 1))
        shift = _shift(larger)
        # One factor for all of a vector: exp is what bounds this kernel next after memory.
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logit - shift[:, None]), 1)
        largest = larger
    shift = _shift(tl.max(largest, 0))
    total_of_row = tl.sum(total * tl.exp(largest - shift), 0)
    tl.store(normalizer + row, tl.log(total_of_row) + shift)
    label = tl.load(labels + row)
    here = (label >= 0) & (label < width)
    tl.store(chosen + row, tl.load(logits + label, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(
    logits, labels, normalizer, weight, gradient, width, blocks, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK columns of one row; programs that run together have neighbouring ones."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    logit = tl.load(logits + row * width + column, mask=inside).to(tl.float32)
    label = tl.load(labels + row)
    label = tl.where((label >= 0) & (label < width), label, -1).to(tl.int32)
    of_row = tl.load(normalizer + row).to(tl.float32)
    softmax = tl.exp(logit - of_row)
    if Z_LOSS != 0.0:
        softmax *= 1.0 + 2.0 * Z_LOSS * of_row
    difference = tl.where(column == label, softmax - 1.0, softmax) * tl.load(weight + row).to(tl.float32)
    tl.store(gradient + row * width + column, difference.to(gradient.dtype.element_ty), mask=inside)


def statistics(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, normalizer_T: torch.Tensor, chosen_T: torch.Tensor
) -> None:
    """Write n and z[y], fp32; all contiguous, logits of at most 32 bits."""
    rows, width = logits_TV.shape
    steps = triton.cdiv(width, LANES * VECTOR.value)
    _statistics_kernel[(rows,)](
        logits_TV, labels_T, normalizer_T, chosen_T, width, STEPS=steps, LANES=LANES, num_warps=ROW_WARPS
    )


def gradient(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    normalizer_T: torch.Tensor,
    weight_T: torch.Tensor,
    gradient_TV: torch.Tensor,
    z_loss: float = 0.0,
) -> None:
    """Write dz, of the logits' type, perhaps in their place; all contiguous, logits of at most 32 bits."""
    rows, width = logits_TV.shape
    blocks = triton.cdiv(width, BLOCK)
    _gradient_kernel[(rows * blocks,)](
        logits_TV,
        labels_T,
        normalizer_T,
        weight_T,
        gradient_TV,
        width,
        blocks,
        # Compiled in: a run has one, and without it the kernel is as if there were none.
        Z_LOSS=z_loss,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
