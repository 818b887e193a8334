"""MeasuredOperands: the operands of one weight, each product on the kernel that measured fastest for it.

T tokens, N out, K in.
    forward   Y  = X (W^R)^T           operand W^R [N, K]
    dgrad     dX = dY W^{R,C}          operand (W^{R,C})^T [K, N]
Each has one sparse operand. Where the dense product measured faster, a dense copy is kept beside it, for the numbers of
tokens that want it.
"""

import abc
import functools
from typing import Generic, Protocol, TypeVar

import torch

from slope_megatron.ops.autotune import measure
from slope_megatron.ops.autotune.resolve import refuse_while_capturing, resolve, uncompiled
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.operands.bias import WithBias
from slope_megatron.ops.operands.protocol import WeightPatterns, not_held


class Measured(Protocol):
    """What a sparse operand says of itself; see `SparseOperand`."""

    library: str

    def fits(self, choice: Choice) -> bool: ...

    def set_metadata(self) -> None: ...


Sparse = TypeVar("Sparse", bound=Measured)
Dense = TypeVar("Dense")


class MeasuredOperands(abc.ABC, Generic[Sparse, Dense]):
    """See the module's docstring.

    Args:
        dtype: of the products, as choices name them.
        dense_allowed: whether a product may fall to the dense candidate.
        among: whose kernels may run it; none named: any library's.
    """

    def __init__(self, patterns: WeightPatterns, dtype: torch.dtype, *, dense_allowed: bool, among: tuple[str, ...]):
        self.patterns, self.dtype = patterns, dtype
        self.dense_allowed, self.among = dense_allowed, among
        self.sparse: dict[Product, Sparse] = {}
        self.dense: dict[Product, Dense] = {}

    # -- state --------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def refresh(self, values_NC: torch.Tensor) -> None:
        """New values, same patterns: after every optimizer step."""

    @torch.no_grad()
    def set_column_pattern(self, column_bits: torch.Tensor, values_NC: torch.Tensor) -> None:
        """A new second pruning: its bitmask, which is kept and not copied."""
        self.patterns.column_bits = column_bits.contiguous()
        if Product.DGRAD in self.sparse:
            self.sparse[Product.DGRAD].set_metadata()
        self.refresh(values_NC)

    # -- choices ------------------------------------------------------------------------------------------------------

    def operand(self, product: Product, tokens: int) -> Sparse | Dense:
        """What a product of so many tokens reads; chosen now, and brought into its layout, if need be."""
        if product not in self.sparse:
            raise not_held(product)
        key, device = Key(product, *self.patterns.shape(product), tokens, self.dtype), self.patterns.device
        measured = functools.partial(measure.measure, key, device, dense_allowed=self.dense_allowed, among=self.among)
        choice = resolve(key, device, measured, on_cpu=Choice(True))
        return self._fitting(choice, product) or uncompiled(self._adopt)(choice, key)

    def _fitting(self, choice: Choice, product: Product) -> Sparse | Dense | None:
        """The operand that a choice runs on; None: there is none in its layout yet."""
        present = self.sparse[product]
        if not choice.sparse:
            # Inference keeps no dense copy: its model would be larger than a dense one.
            may_be_dense = self.dense_allowed and self.patterns.row_bits is not None
            return self.dense.get(product) if may_be_dense else present
        if choice.library in (None, present.library):
            return present if present.fits(choice) else None
        # A choice that other operands of this process made may be of a library that is not allowed here.
        return present if self.among and choice.library not in self.among else None

    @torch.no_grad()
    def _adopt(self, choice: Choice, key: Key) -> Sparse | Dense:
        """Bring this weight's operand into the layout that a choice wants."""
        refuse_while_capturing(key, self.patterns.device)
        if choice.sparse:
            self.change_layout(choice, key.product)
        else:
            self.dense[key.product] = self.dense_copy(key.product)
        found = self._fitting(choice, key.product)
        assert found is not None
        return found

    @abc.abstractmethod
    def change_layout(self, choice: Choice, product: Product) -> None:
        """Make the sparse operand one that fits the choice."""

    @abc.abstractmethod
    def dense_copy(self, product: Product) -> Dense:
        """A dense operand of the present values."""

    # -- products -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def product(self, product: Product, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """X W^T (+ bias), `[T, R]`, W the operand of a product."""

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Y = X (W^R)^T, `[T, N]`."""
        return self.product(Product.FORWARD, x_TK)

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dX = dY W^{R,C}, `[T, K]`."""
        return self.product(Product.DGRAD, dy_TN)

    def with_bias(self, bias_N: torch.Tensor) -> WithBias:
        """These operands with a bias added by the forward product's epilogue."""
        return WithBias(self, bias_N)
