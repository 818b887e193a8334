"""The 2:4 product whose values and metadata are separate tensors, as a registered op.

T tokens, R rows and S columns of the sparse operand, N out, K in, C = K/2 kept per row.
    slope::cutlass_mm     Y [T, R] = X [T, S] W^T + beta C + b, then ReLU where asked
The values are read where they lie: for the forward product in the parameter itself. On CUDA it runs
`slope_kernels.cutlass`; on a CPU its plain-torch twin, which reads the same metadata.
"""

import functools
import logging

import torch

from slope_kernels import cutlass
from slope_megatron.ops import choices, products
from slope_megatron.sparsity.operand import scatter_slots
from slope_megatron.sparsity.operand_cutlass import from_sm90, places_cutlass

logger = logging.getLogger(__name__)


def row_metadata(row_bits: torch.Tensor) -> torch.Tensor:
    """Metadata of W^R in CUTLASS's order, from its bitmask uint8 `[N, K/8]`."""
    rows, eighths = row_bits.shape
    return from_sm90(products.row_metadata(row_bits), rows, eighths * 2)


def column_metadata(row_bits: torch.Tensor, column_bits: torch.Tensor) -> torch.Tensor:
    """Metadata of the transposed W^{R,C} in CUTLASS's order, from both bitmasks."""
    rows, eighths = row_bits.shape
    return from_sm90(products.column_metadata(row_bits, column_bits), eighths * 8, rows // 4)


@functools.cache
def _say_copied(shape: torch.Size) -> None:
    logger.info(
        "a packed weight of %s values does not start on a line of %d bytes: each of its products reads a copy",
        "x".join(map(str, shape)),
        cutlass.ALIGNMENT,
    )


def lined_up(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and on a boundary of 16 bytes, as TMA wants it: itself, or a copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % cutlass.ALIGNMENT == 0 else tensor.clone()


@torch.library.custom_op("slope::cutlass_mm", mutates_args=(), device_types="cuda")
def cutlass_mm(
    values_RC: torch.Tensor,
    metadata: torch.Tensor,
    x_TS: torch.Tensor,
    bias_R: torch.Tensor | None,
    source_TR: torch.Tensor | None,
    beta: float,
    relu: bool,
) -> torch.Tensor:
    """Y `[T, R]`; runs the kernel that was measured for this product, else the first one.

    Args:
        values_RC: a copy is made, and said once, where they do not start on a line of 16 bytes.
        source_TR: C, of the operands' type; None: nothing is added, whatever beta is.
    """
    if values_RC.data_ptr() % cutlass.ALIGNMENT:
        _say_copied(values_RC.shape)
    values_RC, x_TS = lined_up(values_RC), lined_up(x_TS)
    source_TR = None if source_TR is None else lined_up(source_TR)
    y_TR = x_TS.new_empty((x_TS.shape[0], values_RC.shape[0]))
    algorithm = choices.cutlass_algorithm(values_RC.shape[0], x_TS.shape[1], x_TS.shape[0], x_TS.dtype)
    more = {"bias_R": bias_R, "source_TR": source_TR, "beta": beta, "relu": relu}
    cutlass.run(algorithm or cutlass.DEFAULT, values_RC, metadata, x_TS, y_TR, **more)
    return y_TR


@cutlass_mm.register_kernel("cpu")
def _(values_RC, metadata, x_TS, bias_R, source_TR, beta, relu):
    rows, columns = values_RC.shape[0], x_TS.shape[1]
    weight_RS = scatter_slots(values_RC, places_cutlass(metadata, rows, columns // 4))
    y_TR = x_TS @ weight_RS.t()
    y_TR = y_TR if source_TR is None else y_TR + beta * source_TR
    y_TR = y_TR if bias_R is None else y_TR + bias_R
    return torch.relu(y_TR) if relu else y_TR


@cutlass_mm.register_fake
def _(values_RC, metadata, x_TS, bias_R, source_TR, beta, relu):
    return x_TS.new_empty((x_TS.shape[0], values_RC.shape[0]))
