"""Registered ops of `full` mode's wgrad; see `custom_ops.products` for what that means.

T tokens, N out, K in; P the unbiased 2:4 estimate along the tokens; S is T padded with zeros to whole columns.
    slope::mvue_operand   dY [T, N] -> operand of P(dY)^T [N, S]
    slope::sparse_wgrad   dense dW [N, K] = P(dY)^T X, from that operand; by cuSPARSELt
`slope::packed_wgrad`, which gives its kept half alone, is in `operands.cutlass`.
"""

import torch

from slope_kernels import cusparselt
from slope_megatron.ops.custom_ops import layout
from slope_megatron.ops.custom_ops.products import aligned, measured, padded
from slope_megatron.sparsity.mvue24 import two_of_four
from slope_megatron.sparsity.mvue_rng import MvueRng
from slope_megatron.sparsity.operand import indices_sm90, metadata_sm90, scatter_slots
from slope_megatron.sparsity.operand_cutlass import metadata_cutlass


@torch.library.custom_op("slope::mvue_operand", mutates_args=(), device_types="cuda")
def mvue_operand(dy_TN: torch.Tensor, key: torch.Tensor, streams: torch.Tensor, for_cutlass: bool) -> torch.Tensor:
    """Operand, uint8 `[9/8 N S]`, of the estimate that `MvueRng(key, streams, 2, 4)` draws; N a multiple of 64.

    Its metadata is in CUTLASS's order, or in cuSPARSELt's.
    """
    from slope_kernels.triton.mvue import mvue_operand as write

    operand = _new_wgrad_operand(dy_TN)
    write(aligned(dy_TN), key, streams, operand, for_cutlass=for_cutlass)
    return operand


def _new_wgrad_operand(dy_TN: torch.Tensor) -> torch.Tensor:
    size = layout.operand_bytes(dy_TN.shape[1], cusparselt.padded_columns(dy_TN.shape[0]))
    return dy_TN.new_empty(size, dtype=torch.uint8)


@mvue_operand.register_kernel("cpu")
def _(dy_TN, key, streams, for_cutlass):
    groups = cusparselt.padded_columns(dy_TN.shape[0]) // 4
    words = MvueRng(key, streams, 2, 4).words(-(-dy_TN.shape[0] // 4))
    # Groups of zeros alone: any word does.
    words = torch.nn.functional.pad(words, (0, groups - words.shape[1]))
    dy_NS = torch.nn.functional.pad(dy_TN.t(), (0, groups * 4 - dy_TN.shape[0]))
    values, indices = two_of_four(dy_NS, words)
    metadata = metadata_cutlass(indices) if for_cutlass else metadata_sm90(indices)
    return torch.cat((values.contiguous().view(torch.uint8).flatten(), metadata))


@mvue_operand.register_fake
def _(dy_TN, key, streams, for_cutlass):
    return _new_wgrad_operand(dy_TN)


@torch.library.custom_op("slope::sparse_wgrad", mutates_args=(), device_types="cuda")
def sparse_wgrad(operand: torch.Tensor, x_TK: torch.Tensor, rows: int) -> torch.Tensor:
    """Dense dW `[N, K]`; runs the algorithm that was measured for this product, else the library's default."""
    columns, width = cusparselt.padded_columns(x_TK.shape[0]), x_TK.shape[1]
    x_SK = padded(x_TK, columns)
    dw_NK = x_TK.new_empty((rows, width))
    device = x_TK.device.index
    product = cusparselt.Product(rows, columns, width, x_TK.dtype, device, width, straight=True)
    plan = cusparselt.plan(product, measured(product))
    stream = torch.cuda.current_stream(device).cuda_stream
    plan.run(operand.data_ptr(), x_SK.data_ptr(), dw_NK.data_ptr(), stream)
    return dw_NK


@sparse_wgrad.register_kernel("cpu")
def _(operand, x_TK, rows):
    return estimate(operand, x_TK, rows, indices_sm90) @ x_TK


def estimate(operand, x_TK, rows: int, indices_of) -> torch.Tensor:
    """P(dY)^T `[N, T]` that an operand stands for, whose indices `indices_of` reads off its metadata."""
    columns = cusparselt.padded_columns(x_TK.shape[0])
    values = operand[: rows * columns].view(x_TK.dtype).view(rows, columns // 2)
    indices = indices_of(operand[rows * columns :], rows, columns // 4)
    return scatter_slots(values, indices)[:, : x_TK.shape[0]]


@sparse_wgrad.register_fake
def _(operand, x_TK, rows):
    return x_TK.new_empty((rows, x_TK.shape[1]))
