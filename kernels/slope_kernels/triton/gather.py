"""gather and unpack: between a dense matrix and its kept values; both directions touch every byte once.

N out, K in, C = K/2 kept per row. A group is four neighbours of a row: 8 bytes dense, 4 bytes packed, 4 bits of mask.
    gather       dense [N, K] -> packed [N, C]                       2 B read, 1 B written a dense weight
    gather_add   fp32 packed sum += dense at the kept positions      2 B read, and 2 B read and written, a dense weight
    unpack       packed [N, C] -> dense [N, K], zeros elsewhere
Oracle: `slope_megatron.sparsity.packing.pack` and `unpack`.
"""

import torch
import triton
import triton.language as tl

from slope_kernels.triton.bits import load_nibble

BLOCK = 1024


@triton.jit
def _kept_indices(kept):
    """Places of the two bits of a row nibble."""
    first = tl.where((kept & 1) != 0, 0, tl.where((kept & 2) != 0, 1, 2))
    second = tl.where((kept & 8) != 0, 3, tl.where((kept & 4) != 0, 2, 1))
    return first, second


@triton.jit
def _gather_kernel(dense, row_bits, packed, groups, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = group < groups
    four = tl.load(dense + group, mask=mask, other=0)
    first, second = _kept_indices(load_nibble(row_bits, group, mask))
    low = (four >> (first * 16).to(tl.int64)).to(tl.int32) & 0xFFFF
    high = (four >> (second * 16).to(tl.int64)).to(tl.int32) & 0xFFFF
    tl.store(packed + group, low | (high << 16), mask=mask)


@triton.jit
def _to_float(bits, IS_BF16: tl.constexpr):
    """16-bit floats, in the low halves of words, as fp32."""
    if IS_BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _gather_add_kernel(dense, row_bits, total, groups, IS_BF16: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    group = start + tl.arange(0, BLOCK)
    mask = group < groups
    four = tl.load(dense + group, mask=mask, other=0)
    first, second = _kept_indices(load_nibble(row_bits, group, mask))
    low = (four >> (first * 16).to(tl.int64)).to(tl.int32) & 0xFFFF
    high = (four >> (second * 16).to(tl.int64)).to(tl.int32) & 0xFFFF
    value = tl.interleave(_to_float(low, IS_BF16), _to_float(high, IS_BF16))
    place = 2 * start + tl.arange(0, 2 * BLOCK)
    inside = place < 2 * groups
    tl.store(total + place, tl.load(total + place, mask=inside) + value, mask=inside)


@triton.jit
def _unpack_kernel(packed, row_bits, dense, groups, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = group < groups
    pair = tl.load(packed + group, mask=mask, other=0).to(tl.int64)
    first, second = _kept_indices(load_nibble(row_bits, group, mask))
    low = (pair & 0xFFFF) << (first * 16).to(tl.int64)
    high = ((pair >> 16) & 0xFFFF) << (second * 16).to(tl.int64)
    tl.store(dense + group, low | high, mask=mask)


def gather(dense_NK: torch.Tensor, row_bits: torch.Tensor, packed_NC: torch.Tensor) -> None:
    """packed = dense at the kept positions; 16-bit, contiguous, dense 8-byte aligned."""
    groups = dense_NK.numel() // 4
    grid = (triton.cdiv(groups, BLOCK),)
    _gather_kernel[grid](
        dense_NK.view(torch.int64), row_bits, packed_NC.view(torch.int32), groups, BLOCK=BLOCK, num_warps=4
    )


def gather_add(dense_NK: torch.Tensor, row_bits: torch.Tensor, total_NC: torch.Tensor) -> None:
    """total += dense at the kept positions; dense as in `gather`, total fp32 and contiguous."""
    groups = dense_NK.numel() // 4
    grid = (triton.cdiv(groups, BLOCK),)
    is_bf16 = dense_NK.dtype == torch.bfloat16
    _gather_add_kernel[grid](
        dense_NK.view(torch.int64), row_bits, total_NC, groups, IS_BF16=is_bf16, BLOCK=BLOCK, num_warps=4
    )


def unpack(packed_NC: torch.Tensor, row_bits: torch.Tensor, dense_NK: torch.Tensor) -> None:
    """dense = packed at the kept positions, zero elsewhere; 16-bit, contiguous, aligned as in `gather`."""
    groups = dense_NK.numel() // 4
    grid = (triton.cdiv(groups, BLOCK),)
    _unpack_kernel[grid](
        packed_NC.view(torch.int32), row_bits, dense_NK.view(torch.int64), groups, BLOCK=BLOCK, num_warps=4
    )
