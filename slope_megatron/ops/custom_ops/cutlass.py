"""The 2:4 product whose values and metadata are separate tensors, as registered ops.

T tokens, R rows and S columns of the sparse operand.
    slope::cutlass_mm        Y [T, R] = X [T, S] W^T (+ bias, ReLU)
    slope::cutlass_mm_add_   Y += X W^T (+ bias), in place
The values are read where they lie: for the forward product in the parameter itself. On CUDA they run
`slope_kernels.cutlass`; on a CPU their plain-torch twins, which read the same metadata.
"""

import functools
import logging

import torch

from slope_kernels import cutlass
from slope_megatron.ops import choices
from slope_megatron.sparsity.operand import scatter_slots
from slope_megatron.sparsity.operand_cutlass import places_cutlass

logger = logging.getLogger(__name__)


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


def _run(values_RC, metadata, x_TS, y_TR, **epilogue) -> None:
    """The kernel that was measured for this product, else the first one."""
    if values_RC.data_ptr() % cutlass.ALIGNMENT:
        _say_copied(values_RC.shape)
    values_RC, x_TS = lined_up(values_RC), lined_up(x_TS)
    algorithm = choices.cutlass_algorithm(values_RC.shape[0], x_TS.shape[1], x_TS.shape[0], x_TS.dtype)
    cutlass.run(algorithm or cutlass.DEFAULT, values_RC, metadata, x_TS, y_TR, **epilogue)


@torch.library.custom_op("slope::cutlass_mm", mutates_args=(), device_types="cuda")
def cutlass_mm(
    values_RC: torch.Tensor, metadata: torch.Tensor, x_TS: torch.Tensor, bias_R: torch.Tensor | None, relu: bool
) -> torch.Tensor:
    """Y `[T, R]`. Values that do not start on a line of 16 bytes are copied, which is said once."""
    y_TR = x_TS.new_empty((x_TS.shape[0], values_RC.shape[0]))
    _run(values_RC, metadata, x_TS, y_TR, bias_R=bias_R, relu=relu)
    return y_TR


def _weight(values_RC, metadata, columns: int) -> torch.Tensor:
    return scatter_slots(values_RC, places_cutlass(metadata, values_RC.shape[0], columns // 4))


@cutlass_mm.register_kernel("cpu")
def _(values_RC, metadata, x_TS, bias_R, relu):
    y_TR = x_TS @ _weight(values_RC, metadata, x_TS.shape[1]).t()
    y_TR = y_TR if bias_R is None else y_TR + bias_R
    return torch.relu(y_TR) if relu else y_TR


@cutlass_mm.register_fake
def _(values_RC, metadata, x_TS, bias_R, relu):
    return x_TS.new_empty((x_TS.shape[0], values_RC.shape[0]))


@torch.library.custom_op("slope::cutlass_mm_add_", mutates_args=("y_TR",), device_types="cuda")
def cutlass_mm_add_(
    y_TR: torch.Tensor,
    values_RC: torch.Tensor,
    metadata: torch.Tensor,
    x_TS: torch.Tensor,
    bias_R: torch.Tensor | None,
) -> None:
    """Y += X W^T (+ bias): the sum is rounded once."""
    in_place = lined_up(y_TR)
    _run(values_RC, metadata, x_TS, in_place, source_TR=in_place, bias_R=bias_R)
    if in_place is not y_TR:
        y_TR.copy_(in_place)


@cutlass_mm_add_.register_kernel("cpu")
def _(y_TR, values_RC, metadata, x_TS, bias_R):
    y_TR.addmm_(x_TS, _weight(values_RC, metadata, x_TS.shape[1]).t())
    if bias_R is not None:
        y_TR.add_(bias_R)
