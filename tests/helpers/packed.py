"""Random packed 2:4 weights for tests of operands and kernels."""

import dataclasses

import torch

from slope_megatron.sparsity.packing import pack, pack_bits, unpack
from slope_megatron.sparsity.pattern import column_pattern, random_pattern


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed weight [N, C] of W [N, K] with both patterns, as bools and as bitmasks."""

    values: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    row_bits: torch.Tensor
    column_bits: torch.Tensor

    def dense(self) -> torch.Tensor:
        """W^R."""
        return unpack(self.values, self.row)

    def doubly_pruned(self) -> torch.Tensor:
        """W^{R,C}."""
        return unpack(self.values * self.column, self.row)


def packed_weight(rows, columns, dtype, device, *, seed=0, whole_numbers=False) -> Packed:
    """`whole_numbers`: values in -2..2, whose products and sums of a few thousand are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    row = random_pattern(torch.randint(0, 1 << 32, (rows, columns), generator=generator), 2, 4)
    if whole_numbers:
        values = torch.randint(-2, 3, (rows, columns // 2), generator=generator).to(dtype)
    else:
        values = torch.randn(rows, columns // 2, generator=generator).to(dtype)
    column = pack(column_pattern(unpack(values, row), row, 2, 4), row)
    parts = (values, row, column, pack_bits(row), pack_bits(column))
    return Packed(*(tensor.to(device) for tensor in parts))
