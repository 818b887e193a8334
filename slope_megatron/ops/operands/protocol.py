"""What every layout of a weight's operand is, and what it is made of.

T tokens, N out, K in, C kept per row; an operand W is R x S: W^R `[N, K]` for the forward product, the transposed
W^{R,C} `[K, N]` for dgrad. So either product is Y `[T, R]` = X `[T, S]` W^T.
"""

import abc
import dataclasses
from typing import Protocol

import torch

from slope_megatron.ops.choices import Choice, Product
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.sparsity.operand import backward_slots, slot_indices
from slope_megatron.sparsity.packing import unpack_bits


class WeightOperand(Protocol):
    """W of one product, in the layout that one kernel reads."""

    @abc.abstractmethod
    def product(self, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """Y = X W^T (+ bias), `[T, R]`."""

    @abc.abstractmethod
    def add(self, x_TS: torch.Tensor, y_TR: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """Y + X W^T (+ bias), in place."""

    @abc.abstractmethod
    def set_values(self, values_NC: torch.Tensor) -> None:
        """New packed values, same patterns."""


class SparseOperand(WeightOperand, abc.ABC):
    """A 2:4 one, a `WeightOperand`; of one layout, its values set by a refresh, unless a class says otherwise."""

    # Whose kernels read it, of `ops.libraries`.
    library: str
    # Whether it reads the packed values where they lie: they are then set before each use, as the parameter itself
    # where there is one, whose memory may come and go.
    borrows_values: bool = False

    @abc.abstractmethod
    def set_metadata(self) -> None:
        """The patterns are others; values follow by `set_values`."""

    @abc.abstractmethod
    def packed_values(self) -> torch.Tensor:
        """`[N, C]`: what a forward operand holds, or reads."""

    def fits(self, choice: Choice) -> bool:
        """Whether a choice of this operand's library runs on it as it is."""
        return True

    def adopt(self, choice: Choice) -> None:
        """Take the layout that such a choice wants."""
        return

    def refresh_buffer(self) -> tuple[torch.Tensor, int] | None:
        """Where the refresh kernel writes this operand's values (uint8), and in how many tiles; None: `set_values`."""
        return None


@dataclasses.dataclass
class WeightPatterns:
    """Which of a weight's values are where.

    Args:
        row_bits: bitmask uint8 `[N, K/8]` of W^R, kept by reference; None once nothing will ask for it.
        column_bits: bitmask uint8 `[N, C/8]` of what the second pruning keeps; None: forward alone.
    """

    row_bits: torch.Tensor | None
    column_bits: torch.Tensor | None
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, values_NC: torch.Tensor, row_bits: torch.Tensor, column_bits: torch.Tensor | None) -> "WeightPatterns":
        column_bits = None if column_bits is None else column_bits.contiguous()
        shape = (row_bits.shape[0], row_bits.shape[1] * 8)
        return cls(row_bits.contiguous(), column_bits, *shape, values_NC.dtype, values_NC.device)

    def shape(self, product: Product) -> tuple[int, int]:
        """R and S."""
        return (self.rows, self.columns) if product is Product.FORWARD else (self.columns, self.rows)

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two bitmasks, where both are there."""
        assert self.row_bits is not None and self.column_bits is not None
        return self.row_bits, self.column_bits

    def indices(self, product: Product) -> torch.Tensor:
        """Places of the operand's slots, `[R, S/4, 2]`."""
        if product is Product.FORWARD:
            assert self.row_bits is not None
            return slot_indices(unpack_bits(self.row_bits))
        row_NK, survives = map(unpack_bits, self.both())
        return backward_slots(survives.to(torch.uint8), row_NK, survives)[1]

    def metadata_sm90(self, product: Product) -> torch.Tensor:
        """In sm_90's order, uint8 `[R S / 8]`, by our kernels."""
        if product is Product.FORWARD:
            return products.row_metadata(self.row_bits)
        return products.column_metadata(*self.both())

    def metadata(self, product: Product) -> torch.Tensor:
        """In the order that this device's cuSPARSELt reads: by our kernels where they know it, else by the library."""
        if layout.probe(self.device, self.dtype).known_metadata:
            return self.metadata_sm90(product)
        return layout.library_metadata(self.indices(product), self.dtype)

    def dense(self, product: Product, values_NC: torch.Tensor) -> torch.Tensor:
        """W^R or W^{R,C}, `[N, K]` with its zeros."""
        if product is Product.DGRAD:
            values_NC = values_NC * unpack_bits(self.both()[1])
        return products.unpack_kept(values_NC, self.row_bits)


def not_held(product: Product) -> RuntimeError:
    """What to raise where a product's buffers are not there: the operands were built for other products."""
    return RuntimeError(f"these operands hold nothing for {product}: build them with it among their products")
