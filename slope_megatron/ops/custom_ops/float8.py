"""Registered ops of products in e4m3: one scale a tensor, everything on the device, nothing synchronizes.

T tokens, T' the same padded to what products want, R rows and S columns of an operand, N out, K in, C = K/2 kept a row.
    slope::quantize_e4m3      x [T, S] -> q [T', S] and / or its transpose [S, T'], and the scale s [1];  x ~ s q
    slope::sparse_mm_e4m3     Y [T', R] = s_w s_x Q W^T (+ bias), W an operand buffer
    slope::refresh_e4m3_      packed values -> the values of both operands, and their scale
q is uint8, the bytes of e4m3 numbers: most of torch knows no arithmetic on that type.
On CUDA they run `slope_kernels`; on a CPU plain-torch references, which read and write the same buffers.
"""

import torch

from slope_kernels import cusparselt
from slope_megatron.ops.custom_ops import layout
from slope_megatron.ops.custom_ops.products import aligned, measured
from slope_megatron.sparsity import float8
from slope_megatron.sparsity.float8 import E4M3
from slope_megatron.sparsity.operand import backward_slots, indices_e4m3, scatter_slots
from slope_megatron.sparsity.packing import unpack_bits


def _copies(x_TS: torch.Tensor, rows: bool, columns: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the results of a quantization; a copy that is not wanted is empty."""
    tokens, width = x_TS.shape
    padded = cusparselt.padded_tokens(tokens)
    q = x_TS.new_empty((padded if rows else 0, width), dtype=torch.uint8)
    transposed = x_TS.new_empty((width, padded if columns else 0), dtype=torch.uint8)
    return q, transposed, x_TS.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("slope::quantize_e4m3", mutates_args=(), device_types="cuda")
def quantize(
    x_TS: torch.Tensor, rows: bool, columns: bool, partner: torch.Tensor | None = None, target: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[T', S]`, its transpose `[S, T']` and the scale `[1]`; a copy that is not wanted is empty.

    With a partner's scale `[1]`, the scale is aimed: see `sparsity.float8.aimed`.
    """
    from slope_kernels.triton import quantize as kernels

    x_TS = aligned(x_TS)
    q, transposed, scale = _copies(x_TS, rows, columns)
    amax = torch.zeros(1, dtype=torch.int32, device=x_TS.device)
    kernels.amax_bits(x_TS, amax)
    copies = (q if rows else None, transposed if columns else None)
    kernels.quantize(x_TS, amax, scale, *copies, partner=partner, target=target)
    return q, transposed, scale


@quantize.register_kernel("cpu")
def _(x_TS, rows, columns, partner=None, target=0):
    q, transposed, scale = _copies(x_TS, rows, columns)
    found_scale = float8.scale_of(x_TS.abs().amax())
    if partner is not None:
        found_scale = float8.aimed(found_scale, partner[0], target)
    found, _ = float8.quantize(x_TS, found_scale)
    padded = torch.nn.functional.pad(found.view(torch.uint8), (0, 0, 0, -x_TS.shape[0] % 16))
    if rows:
        q.copy_(padded)
    if columns:
        transposed.copy_(padded.t())
    return q, transposed, scale.copy_(found_scale)


@quantize.register_fake
def _(x_TS, rows, columns, partner=None, target=0):
    return _copies(x_TS, rows, columns)


@torch.library.custom_op("slope::sparse_mm_e4m3", mutates_args=(), device_types="cuda")
def sparse_mm(
    operand: torch.Tensor,
    operand_scale: torch.Tensor,
    q_TS: torch.Tensor,
    q_scale: torch.Tensor,
    rows: int,
    bias: torch.Tensor | None,
    output: torch.dtype,
    target: int,
) -> torch.Tensor:
    """Y `[T', R]` in `output`; runs the algorithm that was measured for this product, else the library's default.

    The library takes no scale from the device, but a factor from the host: 2^target. Where the scales' product is
    another, a second pass over Y makes it right; powers of two lose nothing. A bias comes in that pass.
    """
    from slope_kernels.triton.quantize import rescale

    tokens, columns = q_TS.shape
    y_TR = q_TS.new_empty((tokens, rows), dtype=output)
    device = q_TS.device.index
    product = cusparselt.Product(rows, columns, tokens, E4M3, device, rows, output=output)
    plan = cusparselt.plan(product, measured(product))
    stream = torch.cuda.current_stream(device).cuda_stream
    plan.run(operand.data_ptr(), q_TS.data_ptr(), y_TR.data_ptr(), stream, factor=2.0**target)
    rescale(y_TR, operand_scale, q_scale, 2.0**-target, bias)
    return y_TR


@sparse_mm.register_kernel("cpu")
def _(operand, operand_scale, q_TS, q_scale, rows, bias, output, target):
    columns = q_TS.shape[1]
    values = layout.values_of(operand, rows, columns, 1, E4M3)[0]
    indices = indices_e4m3(layout.metadata_of(operand, rows, columns, 1)[0], rows, columns // 4)
    return float8.scaled_mm(q_TS.view(E4M3), scatter_slots(values, indices), q_scale, operand_scale, bias, output)


@sparse_mm.register_fake
def _(operand, operand_scale, q_TS, q_scale, rows, bias, output, target):
    return q_TS.new_empty((q_TS.shape[0], rows), dtype=output)


def dense_mm(q_TS, w_RS, q_scale, w_scale, bias, output: torch.dtype) -> torch.Tensor:
    """The same product with a dense W `[R, S]`, bytes too: torch's own."""
    q_TS, w_RS = q_TS.view(E4M3), w_RS.view(E4M3)
    if q_TS.is_cuda:
        return torch._scaled_mm(
            q_TS, w_RS.t(), scale_a=q_scale, scale_b=w_scale, bias=bias, out_dtype=output, use_fast_accum=True
        )
    return float8.scaled_mm(q_TS, w_RS, q_scale, w_scale, bias, output)


@torch.library.custom_op("slope::refresh_e4m3_", mutates_args=("forward", "backward", "scale"), device_types="cuda")
def refresh_(
    values_NC: torch.Tensor,
    row_bits: torch.Tensor,
    column_bits: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    scale: torch.Tensor,
) -> None:
    """Values of the operands that are there and their common scale from the packed values; metadata stays."""
    from slope_kernels.triton import quantize as kernels
    from slope_kernels.triton.refresh import refresh

    values_NC = aligned(values_NC)
    rows, columns = values_NC.shape[0], values_NC.shape[1] * 2
    amax = torch.zeros(1, dtype=torch.int32, device=values_NC.device)
    kernels.amax_bits(values_NC, amax)
    if forward is not None:
        kernels.quantize(values_NC, amax, scale, forward[: values_NC.numel()].view(values_NC.shape), None)
    if backward is not None:
        # The transposition is done in 16 bits, into scratch: this runs once a step, and then the same kernel rounds.
        slots = values_NC.new_empty((columns, rows // 2))
        refresh(values_NC, row_bits, column_bits, None, slots.view(-1).view(torch.uint8))
        kernels.quantize(slots, amax, scale, backward[: slots.numel()].view(slots.shape), None)


@refresh_.register_kernel("cpu")
def _(values_NC, row_bits, column_bits, forward, backward, scale):
    slots, _ = backward_slots(values_NC, unpack_bits(row_bits), unpack_bits(column_bits))
    scale.copy_(float8.scale_of(values_NC.abs().amax()))
    for buffer, source in ((forward, values_NC), (backward, slots)):
        if buffer is not None:
            q, _ = float8.quantize(source, scale[0])
            buffer[: source.numel()].copy_(q.view(torch.uint8).flatten())
