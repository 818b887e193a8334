"""gather and unpack: between a dense matrix and its kept values; both directions touch every byte once.

N out, K in, C = K/2 kept per row. A group is four neighbours of a row: 8 bytes dense, 4 bytes packed, 4 bits of mask.
    gather       dense [N, K] -> packed [N, C]                       2 B read, 1 B written a dense weight
    gather_add   packed [N, C] += dense [N, K] at the kept places    packed may be fp32: gradient accumulation
    unpack       packed [N, C] -> dense [N, K], zeros elsewhere
Oracle: `slope_megatron.sparsity.packing.pack` and `unpack`.
"""

import torch
import triton
import triton.language as tl

from slope_kernels.triton.places import load_nibble

BLOCK = 1024


@triton.jit
def _kept_places(kept):
    """Places of the two bits of a row nibble."""
    first = tl.where((kept & 1) != 0, 0, tl.where((kept & 2) != 0, 1, 2))
    second = tl.where((kept & 8) != 0, 3, tl.where((kept & 4) != 0, 2, 1))
    return first, second


@triton.jit
def _load_kept(dense, row_bits, group, mask):
    """The 16 bits of the low and of the high kept value of each group."""
    four = tl.load(dense + group, mask=mask, other=0)
    first, second = _kept_places(load_nibble(row_bits, group, mask))
    low = (four >> (first * 16).to(tl.int64)).to(tl.int32) & 0xFFFF
    high = (four >> (second * 16).to(tl.int64)).to(tl.int32) & 0xFFFF
    return low, high


@triton.jit
def _gather_kernel(dense, row_bits, packed, groups, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = group < groups
    low, high = _load_kept(dense, row_bits, group, mask)
    tl.store(packed + group, low | (high << 16), mask=mask)


@triton.jit
def _as_float(bits, IS_BF16: tl.constexpr):
    if IS_BF16:
        value = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = bits.to(tl.uint16).to(tl.float16, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _gather_add_kernel(dense, row_bits, packed, groups, IS_BF16: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    group = start + tl.arange(0, BLOCK)
    low, high = _load_kept(dense, row_bits, group, group < groups)
    gradient = tl.reshape(tl.join(_as_float(low, IS_BF16), _as_float(high, IS_BF16)), (2 * BLOCK,))
    place = start * 2 + tl.arange(0, 2 * BLOCK)
    mask = place < groups * 2
    total = tl.load(packed + place, mask=mask, other=0.0).to(tl.float32) + gradient
    tl.store(packed + place, total.to(packed.dtype.element_ty), mask=mask)


@triton.jit
def _unpack_kernel(packed, row_bits, dense, groups, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = group < groups
    pair = tl.load(packed + group, mask=mask, other=0).to(tl.int64)
    first, second = _kept_places(load_nibble(row_bits, group, mask))
    low = (pair & 0xFFFF) << (first * 16).to(tl.int64)
    high = ((pair >> 16) & 0xFFFF) << (second * 16).to(tl.int64)
    tl.store(dense + group, low | high, mask=mask)


def gather(dense_NK: torch.Tensor, row_bits: torch.Tensor, packed_NC: torch.Tensor) -> None:
    """packed = dense at the kept places; 16-bit, contiguous, dense 8-byte aligned."""
    groups = dense_NK.numel() // 4
    grid = (triton.cdiv(groups, BLOCK),)
    _gather_kernel[grid](
        dense_NK.view(torch.int64), row_bits, packed_NC.view(torch.int32), groups, BLOCK=BLOCK, num_warps=4
    )


def gather_add(dense_NK: torch.Tensor, row_bits: torch.Tensor, packed_NC: torch.Tensor) -> None:
    """packed += dense at the kept places; the sum is rounded once, to packed's dtype (16-bit or fp32)."""
    groups = dense_NK.numel() // 4
    grid = (triton.cdiv(groups, BLOCK),)
    is_bf16 = dense_NK.dtype == torch.bfloat16
    _gather_add_kernel[grid](
        dense_NK.view(torch.int64), row_bits, packed_NC, groups, IS_BF16=is_bf16, BLOCK=BLOCK, num_warps=4
    )


def unpack(packed_NC: torch.Tensor, row_bits: torch.Tensor, dense_NK: torch.Tensor) -> None:
    """dense = packed at the kept places, zero elsewhere; 16-bit, contiguous, aligned as in `gather`."""
    groups = dense_NK.numel() // 4
    grid = (triton.cdiv(groups, BLOCK),)
    _unpack_kernel[grid](
        packed_NC.view(torch.int32), row_bits, dense_NK.view(torch.int64), groups, BLOCK=BLOCK, num_warps=4
    )
