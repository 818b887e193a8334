"""PackedOperands: what the three products of one 16-bit 2:4 weight read.

N out, K in, C = K/2 kept per row, T tokens. Forward and dgrad as `MeasuredOperands` has them, in the layout of one
library each; adapters may go into an operand. wgrad is dW = (dY^T X) gathered, or with an rng that of P(dY)^T X
(`operands.wgrad`).
"""

from typing import Any

import torch

from slope_megatron.ops import choices, libraries, update
from slope_megatron.ops.choices import PRODUCTS, Choice, Key, Product
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.ops.operands import wgrad
from slope_megatron.ops.operands.augmented import AugmentedOperand
from slope_megatron.ops.operands.cusparselt import CusparseltOperand
from slope_megatron.ops.operands.dense import DenseOperand
from slope_megatron.ops.operands.measured import MeasuredOperands
from slope_megatron.ops.operands.protocol import SparseOperand, WeightPatterns, not_held
from slope_megatron.sparsity.mvue_rng import MvueRng

LIBRARIES = libraries.load()


class PackedOperands(MeasuredOperands[SparseOperand, DenseOperand]):
    """Operands of one weight; see the module's docstring."""

    def __init__(
        self,
        values_NC: torch.Tensor,
        row_bits: torch.Tensor,
        column_bits: torch.Tensor | None,
        *,
        library: str = "cusparselt",
        dense_allowed: bool = True,
        products_wanted: tuple[Product, ...] = PRODUCTS,
    ):
        """
        Args:
            row_bits, column_bits: bitmasks uint8 `[N, K/8]` and `[N, C/8]`, kept and not copied. Without a column
                bitmask there is the forward product alone, and neither is kept.
            library: whose layout the operands have until another one measures faster.
            dense_allowed: whether a product may fall to the dense candidate, or to another library's kernels.
            products_wanted: those that will be asked for; the operand of another one is not there.
        """
        # Operands that live for one use are not worth another layout.
        lasting = dense_allowed and set(products_wanted) == set(PRODUCTS)
        patterns = WeightPatterns.of(values_NC, row_bits, column_bits)
        among = () if lasting else (library,)
        super().__init__(patterns, values_NC.dtype, dense_allowed=dense_allowed, among=among)
        self.wgrad_among: tuple[str, ...] = tuple(LIBRARIES) if dense_allowed else (library,)
        for product in (Product.FORWARD, Product.DGRAD):
            if product in products_wanted:
                self.sparse[product] = LIBRARIES[library].Operand(patterns, product)
        # Without the forward operand the values are here no longer than these operands.
        self.borrowed_NC = values_NC if Product.FORWARD not in self.sparse else None
        self.refresh(values_NC)
        if column_bits is None:
            patterns.row_bits = None

    # -- state --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, values_NC: torch.Tensor) -> None:
        buffers = {product: operand.refresh_buffer() for product, operand in self.sparse.items()}
        together = buffers.get(Product.DGRAD) is not None
        if together:
            # One kernel reads the values once for both operands.
            forward, forward_tiles = buffers.get(Product.FORWARD) or (None, 1)
            backward, backward_tiles = buffers[Product.DGRAD] or (None, 1)
            tiles = (forward_tiles, backward_tiles)
            products.refresh_(values_NC, *self.patterns.both(), forward, backward, *tiles)
        for product, operand in self.sparse.items():
            if not together or buffers[product] is None:
                operand.set_values(values_NC)
        for dense in self.dense.values():
            dense.set_values(values_NC)

    def rebind(self, values_NC: torch.Tensor) -> None:
        """The same values are here now. Cheap: optimizers move parameters into flat buffers, ZeRO-3 at every use."""
        for operand in self.sparse.values():
            if operand.borrows_values:
                operand.set_values(values_NC)

    def change_layout(self, choice: Choice, product: Product) -> None:
        present = self.sparse[product]
        if choice.library in (None, present.library):
            present.adopt(choice)
            return
        operand = LIBRARIES[choice.library].Operand(self.patterns, product)
        operand.set_values(self._values())
        self.sparse[product] = operand

    def dense_copy(self, product: Product) -> DenseOperand:
        return DenseOperand(self.patterns, product, self._values())

    def _values(self) -> torch.Tensor:
        """`[N, C]`, as the operands have them: the caller's may have changed since the last refresh."""
        return self.sparse[Product.FORWARD].packed_values() if self.borrowed_NC is None else self.borrowed_NC

    # -- products -----------------------------------------------------------------------------------------------------

    def operand(self, product: Product, tokens: int) -> SparseOperand | DenseOperand:
        """As of `MeasuredOperands`; with adapters in it the operand is no longer a matter of choice."""
        return self.augmented(product) or super().operand(product, tokens)

    def product(self, product: Product, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        return self.operand(product, x_TS.shape[0]).product(x_TS, bias_R)

    def add(
        self, product: Product, x_TS: torch.Tensor, y_TR: torch.Tensor, bias_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Y + X W^T (+ bias), in place."""
        return self.operand(product, x_TS.shape[0]).add(x_TS, y_TR, bias_R)

    def wgrad(
        self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None, total: torch.Tensor | None = None
    ):
        """dW = dY^T X at the kept positions, `[N, C]`; with an rng P(dY)^T X, or the exact one where that is faster."""
        row_bits = self.patterns.row_bits
        if row_bits is None:
            raise not_held(Product.WGRAD)
        if rng is None:
            return update.kept(dy_TN.t() @ x_TK, row_bits, total)
        allowed: dict[str, Any] = {"dense_allowed": self.dense_allowed, "among": self.wgrad_among}
        return wgrad.packed(dy_TN, x_TK, row_bits, rng, total, **allowed)

    # -- adapters -----------------------------------------------------------------------------------------------------

    def augmented(self, product: Product) -> AugmentedOperand | None:
        """The operand of a product if it has adapters in it."""
        operand = self.sparse.get(product)
        return operand if isinstance(operand, AugmentedOperand) else None

    def can_augment(self, product: Product, tokens: int, rank: int) -> bool:
        """Whether adapters may go into an operand: where it is cuSPARSELt's, in a layout that we know."""
        plain = choices.find(Key(product, *self.patterns.shape(product), tokens, self.dtype))
        if plain is not None and (not plain.sparse or plain.library not in (None, CusparseltOperand.library)):
            return False
        known = layout.probe(self.patterns.device, self.dtype).known_metadata
        return isinstance(self.sparse.get(product), CusparseltOperand) and rank % 4 == 0 and known

    @torch.no_grad()
    def augmented_copy(self, product: Product, rank: int) -> AugmentedOperand:
        """An operand with room for adapters, beside the plain one; where `can_augment`."""
        plain = self.sparse[product]
        assert isinstance(plain, CusparseltOperand)
        return AugmentedOperand(plain, rank)

    def augment(self, product: Product, rank: int) -> None:
        """Replace the plain operand, and its dense copy, by one with room for adapters."""
        self.sparse[product] = self.augmented_copy(product, rank)
        self.dense.pop(product, None)
