"""The sparse operand of one product as our own kernels read it: values and metadata apart.

T tokens, R rows and S columns of the operand, N out, K in.
"""

import dataclasses

import torch

from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.ops.custom_ops.cutlass import cutlass_mm, cutlass_mm_add_
from slope_megatron.sparsity.operand_cutlass import from_sm90


def row_metadata(row_bits: torch.Tensor) -> torch.Tensor:
    """Metadata of W^R in CUTLASS's order, from its bitmask uint8 `[N, K/8]`."""
    rows, eighths = row_bits.shape
    return from_sm90(products.row_metadata(row_bits), rows, eighths * 2)


def column_metadata(row_bits: torch.Tensor, column_bits: torch.Tensor) -> torch.Tensor:
    """Metadata of the transposed W^{R,C} in CUTLASS's order, from both bitmasks."""
    rows, eighths = row_bits.shape
    return from_sm90(products.column_metadata(row_bits, column_bits), eighths * 8, rows // 4)


@dataclasses.dataclass
class CutlassOperand:
    """W.

    Args:
        values_RC: `[R, S/2]`, perhaps a parameter's own memory.
        metadata: uint8, of `row_metadata` or `column_metadata`.
    """

    values_RC: torch.Tensor
    metadata: torch.Tensor

    def product(self, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """Y = X W^T (+ bias), `[T, R]`."""
        return cutlass_mm(self.values_RC, self.metadata, x_TS, bias_R, False)

    def add(self, x_TS: torch.Tensor, y_TR: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """Y + X W^T (+ bias), in the place of Y."""
        cutlass_mm_add_(y_TR, self.values_RC, self.metadata, x_TS, bias_R)
        return y_TR


def hand_over(operands, kind: str) -> None:
    """Give one of cuSPARSELt's operands, of one tile, the form that our own kernels read."""
    rows, columns, dtype = operands.rows, operands.columns, operands.dtype
    if kind == "forward":
        # The operand's own values serve until the parameter itself is bound.
        values_NC = layout.values_of(operands.forward_operand, rows, columns, 1, dtype)[0]
        operands.handed_over[kind] = CutlassOperand(values_NC, row_metadata(operands.row_bits))
        operands.forward_operand = None
    else:
        operands.backward_operand = operands.backward_operand[: rows * columns].clone()
        values_KN = operands.backward_operand.view(dtype).view(columns, -1)
        metadata = column_metadata(operands.row_bits, operands.column_bits)
        operands.handed_over[kind] = CutlassOperand(values_KN, metadata)
