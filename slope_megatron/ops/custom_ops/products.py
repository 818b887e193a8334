"""Registered ops: plain tensors, with schemas and fakes, so that `torch.compile` and CUDA graphs see through them.

T tokens, R rows and S columns of an operand, N out, K in, C = K/2 kept per row.
    slope::sparse_mm      Y [T, R] = X [T, S] W^T (+ bias), W an operand buffer
    slope::sparse_mm_add_ Y += X W^T (+ bias), in the product's epilogue
    slope::gather_kept    dense [N, K] -> its kept values [N, C];   slope::unpack_kept  is its transpose
    slope::refresh_       packed values -> both operands' values
    slope::choose_column  the second pruning by magnitude -> bitmask [N, C/8]
    slope::row_metadata_, slope::column_metadata_   the operands' metadata
On CUDA they run `slope_kernels`; on a CPU plain-torch references, which read and write the same buffers. Those of
`full` mode are in `custom_ops.mvue`.
"""

import importlib.util

import torch

from slope_kernels import cusparselt
from slope_megatron.ops import choices
from slope_megatron.sparsity.operand import backward_slots, indices_sm90, metadata_sm90, scatter_slots, slot_indices
from slope_megatron.sparsity.packing import pack, pack_bits, unpack, unpack_bits
from slope_megatron.sparsity.pattern import column_pattern

# Looked for once: each loss, activation and gradient asks.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether Triton's kernels that compute in fp32 are there, and precise enough for these numbers."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and HAS_TRITON


def aligned(tensor: torch.Tensor, to: int = 4) -> torch.Tensor:
    """Kernels read contiguous words of `to` bytes; a view, or a parameter in a flat buffer, may lie elsewhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % to == 0 else tensor.clone()


def padded(x_TS: torch.Tensor, tokens: int) -> torch.Tensor:
    """X with zeros up to `tokens`, as the library wants to read it."""
    missing = tokens - x_TS.shape[0]
    return torch.nn.functional.pad(x_TS, (0, 0, 0, missing)) if missing else aligned(x_TS, cusparselt.ALIGNMENT)


def measured(product: cusparselt.Product) -> cusparselt.Algorithm | None:
    """The algorithm that was measured for a product (of one tile, where the operand is cut); None: the default."""
    problem = (product.rows, product.columns, product.tokens, product.dtype, product.straight)
    return choices.algorithm("cusparselt", problem)


@torch.library.custom_op("slope::sparse_mm", mutates_args=(), device_types="cuda")
def sparse_mm(
    operand: torch.Tensor, x_TS: torch.Tensor, rows: int, tiles: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Y `[T, R]`; runs the algorithm that was measured for this product, else the library's default."""
    tokens = x_TS.shape[0]
    x_TS = padded(x_TS, cusparselt.padded_tokens(tokens))
    y_TR = x_TS.new_empty((x_TS.shape[0], rows))
    _run_tiles(operand, x_TS, y_TR, tiles, bias, False)
    return y_TR[:tokens].clone() if tokens != y_TR.shape[0] else y_TR


def _run_tiles(operand, x_TS, y_TR, tiles: int, bias, accumulate: bool) -> None:
    """Enqueue the product, tile by tile; X and Y hold padded tokens."""
    rows, device = y_TR.shape[1], x_TS.device.index
    product = cusparselt.Product(rows // tiles, x_TS.shape[1], x_TS.shape[0], x_TS.dtype, device, rows)
    algorithm = measured(product)
    stream = torch.cuda.current_stream(device).cuda_stream
    operand_start, y_start = operand.data_ptr(), y_TR.data_ptr()
    for tile in range(tiles):
        first = tile * (rows // tiles) * x_TS.element_size()
        plan = cusparselt.plan(product, algorithm, bias.data_ptr() + first if bias is not None else 0)
        start = operand_start + tile * operand.numel() // tiles
        plan.run(start, x_TS.data_ptr(), y_start + first, stream, accumulate=accumulate)


@sparse_mm.register_kernel("cpu")
def _(operand, x_TS, rows, tiles, bias):
    y_TR = x_TS @ _operand_matrix(operand, rows, x_TS.shape[1], tiles, x_TS.dtype).t()
    return y_TR if bias is None else y_TR + bias


def _operand_matrix(operand, rows: int, columns: int, tiles: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix `[R, S]` that an operand buffer stands for."""
    parts = []
    size = rows // tiles * columns
    for tile in operand.view(tiles, -1):
        values = tile[:size].view(dtype).view(rows // tiles, columns // 2)
        parts.append(scatter_slots(values, indices_sm90(tile[size:], rows // tiles, columns // 4)))
    return torch.cat(parts)


@sparse_mm.register_fake
def _(operand, x_TS, rows, tiles, bias):
    return x_TS.new_empty((x_TS.shape[0], rows))


@torch.library.custom_op("slope::sparse_mm_add_", mutates_args=("y_TR",), device_types="cuda")
def sparse_mm_add_(
    y_TR: torch.Tensor, operand: torch.Tensor, x_TS: torch.Tensor, tiles: int, bias: torch.Tensor | None
) -> None:
    """Y `[T, R]`, contiguous, += X W^T (+ bias): sums in fp32, rounded once."""
    tokens = cusparselt.padded_tokens(y_TR.shape[0])
    padded_TR = padded(y_TR, tokens)
    _run_tiles(operand, padded(x_TS, tokens), padded_TR, tiles, bias, True)
    if padded_TR.data_ptr() != y_TR.data_ptr():
        y_TR.copy_(padded_TR[: y_TR.shape[0]])


@sparse_mm_add_.register_kernel("cpu")
def _(y_TR, operand, x_TS, tiles, bias):
    weight_RS = _operand_matrix(operand, y_TR.shape[1], x_TS.shape[1], tiles, x_TS.dtype)
    total_TR = y_TR.float() + x_TS.float() @ weight_RS.float().t()
    y_TR.copy_(total_TR if bias is None else total_TR + bias)


@torch.library.custom_op("slope::gather_kept", mutates_args=(), device_types="cuda")
def gather_kept(dense_NK: torch.Tensor, row_bits: torch.Tensor) -> torch.Tensor:
    """The kept values `[N, C]` of a dense matrix; a gradient's, say."""
    from slope_kernels.triton.gather import gather

    packed_NC = dense_NK.new_empty((dense_NK.shape[0], dense_NK.shape[1] // 2))
    gather(aligned(dense_NK, 8), aligned(row_bits), packed_NC)
    return packed_NC


@gather_kept.register_kernel("cpu")
def _(dense_NK, row_bits):
    return pack(dense_NK, unpack_bits(row_bits))


@gather_kept.register_fake
def _(dense_NK, row_bits):
    return dense_NK.new_empty((dense_NK.shape[0], dense_NK.shape[1] // 2))


@torch.library.custom_op("slope::unpack_kept", mutates_args=(), device_types="cuda")
def unpack_kept(values_NC: torch.Tensor, row_bits: torch.Tensor) -> torch.Tensor:
    """W^R `[N, K]` with its zeros."""
    from slope_kernels.triton.gather import unpack as unpack_kernel

    dense_NK = values_NC.new_empty((values_NC.shape[0], values_NC.shape[1] * 2))
    unpack_kernel(aligned(values_NC), aligned(row_bits), dense_NK)
    return dense_NK


@unpack_kept.register_kernel("cpu")
def _(values_NC, row_bits):
    return unpack(values_NC, unpack_bits(row_bits))


@unpack_kept.register_fake
def _(values_NC, row_bits):
    return values_NC.new_empty((values_NC.shape[0], values_NC.shape[1] * 2))


def _save_bits(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


gather_kept.register_autograd(lambda ctx, d_NC: (unpack_kept(d_NC, *ctx.saved_tensors), None), setup_context=_save_bits)
unpack_kept.register_autograd(lambda ctx, d_NK: (gather_kept(d_NK, *ctx.saved_tensors), None), setup_context=_save_bits)


@torch.library.custom_op("slope::refresh_", mutates_args=("forward", "backward"), device_types="cuda")
def refresh_(
    values_NC: torch.Tensor,
    row_bits: torch.Tensor,
    column_bits: torch.Tensor,
    forward: torch.Tensor | None,
    backward: torch.Tensor | None,
    forward_tiles: int,
    backward_tiles: int,
) -> None:
    """Values of both operands from the packed values; their metadata stays."""
    from slope_kernels.triton.refresh import refresh

    refresh(
        aligned(values_NC),
        aligned(row_bits),
        aligned(column_bits),
        forward,
        backward,
        forward_tiles=forward_tiles,
        backward_tiles=backward_tiles,
    )


@refresh_.register_kernel("cpu")
def _(values_NC, row_bits, column_bits, forward, backward, forward_tiles, backward_tiles):
    rows, columns = values_NC.shape[0], values_NC.shape[1] * 2
    transposed, _ = backward_slots(values_NC, unpack_bits(row_bits), unpack_bits(column_bits))
    for buffer, slots, tiles in ((forward, values_NC, forward_tiles), (backward, transposed, backward_tiles)):
        if buffer is not None:
            part = buffer.view(tiles, -1)[:, : rows * columns // tiles]
            part.copy_(slots.contiguous().view(torch.uint8).view_as(part))


@torch.library.custom_op("slope::choose_column", mutates_args=(), device_types="cuda")
def choose_column(values_NC: torch.Tensor, row_bits: torch.Tensor) -> torch.Tensor:
    """The second pruning of the present values by magnitude: bitmask uint8 `[N, C/8]`; on a GPU K a multiple of 32."""
    from slope_kernels.triton.choose import choose_column as choose

    column_bits = row_bits.new_empty((values_NC.shape[0], values_NC.shape[1] // 8))
    choose(aligned(values_NC), aligned(row_bits), column_bits)
    return column_bits


@choose_column.register_kernel("cpu")
def _(values_NC, row_bits):
    row_NK = unpack_bits(row_bits)
    return pack_bits(pack(column_pattern(unpack(values_NC, row_NK), row_NK, 2, 4), row_NK))


@choose_column.register_fake
def _(values_NC, row_bits):
    return row_bits.new_empty((values_NC.shape[0], values_NC.shape[1] // 8))


@torch.library.custom_op("slope::row_metadata", mutates_args=(), device_types="cuda")
def row_metadata(row_bits: torch.Tensor) -> torch.Tensor:
    """The forward operand's metadata, uint8 `[N K / 8]`."""
    from slope_kernels.triton.metadata import row_metadata as write

    metadata = row_bits.new_empty(row_bits.numel())
    write(aligned(row_bits), metadata)
    return metadata


@row_metadata.register_kernel("cpu")
def _(row_bits):
    return metadata_sm90(slot_indices(unpack_bits(row_bits)))


@torch.library.custom_op("slope::column_metadata", mutates_args=(), device_types="cuda")
def column_metadata(row_bits: torch.Tensor, column_bits: torch.Tensor) -> torch.Tensor:
    """The backward operand's metadata, uint8 `[N K / 8]`."""
    from slope_kernels.triton.metadata import column_metadata as write

    metadata = row_bits.new_empty(row_bits.numel())
    write(aligned(row_bits), aligned(column_bits), metadata)
    return metadata


@column_metadata.register_kernel("cpu")
def _(row_bits, column_bits):
    column_NC = unpack_bits(column_bits)
    return metadata_sm90(backward_slots(column_NC.to(torch.float32), unpack_bits(row_bits), column_NC)[1])


@row_metadata.register_fake
def _(row_bits):
    return row_bits.new_empty(row_bits.numel())


@column_metadata.register_fake
def _(row_bits, column_bits):
    return row_bits.new_empty(row_bits.numel())
