"""PackedOperands: what the three products of one 16-bit 2:4 weight read, each in the form that measured fastest.

N out, K in, C = K/2 kept per row, T tokens.
    forward   Y  = X (W^R)^T           operand W^R [N, K]
    dgrad     dX = dY W^{R,C}          operand (W^{R,C})^T [K, N]
    wgrad     dW = (dY^T X) gathered; with random streams that of P(dY)^T X, see `operands.wgrad`
Forward and dgrad have one sparse operand each, in the form of one library; adapters may go into it. Where the dense
product measured faster, a dense copy is kept beside it, for the numbers of tokens that want it.
"""

import functools

import torch

from slope_megatron.ops import choices, libraries
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.autotune.resolve import resolve, uncompiled
from slope_megatron.ops.choices import PRODUCTS, Choice, Key, Product, Strategy
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.ops.operands import wgrad
from slope_megatron.ops.operands.augmented import AugmentedOperand
from slope_megatron.ops.operands.bias import WithBias
from slope_megatron.ops.operands.cusparselt import CusparseltOperand
from slope_megatron.ops.operands.dense import DenseOperand
from slope_megatron.ops.operands.protocol import SparseOperand, WeightOperand, WeightPatterns, not_held
from slope_megatron.sparsity.mvue_rng import MvueRng

LIBRARIES = libraries.load()


class PackedOperands:
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
            library: whose form the operands have until another one measures faster.
            dense_allowed: whether a product may fall to the dense candidate, or to another library's kernels.
            products_wanted: those that will be asked for; the operand of another one is not there.
        """
        self.patterns = WeightPatterns.of(values_NC, row_bits, column_bits)
        self.dense_allowed = dense_allowed
        # Operands that live for one use are not worth another form.
        lasting = dense_allowed and set(products_wanted) == set(PRODUCTS)
        # Whose kernels forward and dgrad may run; none named: any.
        self.among: tuple[str, ...] = () if lasting else (library,)
        self.wgrad_among: tuple[str, ...] = tuple(LIBRARIES) if dense_allowed else (library,)
        self.sparse: dict[Product, SparseOperand] = {
            product: LIBRARIES[library].Operand(self.patterns, product)
            for product in (Product.FORWARD, Product.DGRAD)
            if product in products_wanted
        }
        self.dense: dict[Product, DenseOperand] = {}
        # Without the forward operand the values are here no longer than these operands.
        self.borrowed_NC = values_NC if Product.FORWARD not in self.sparse else None
        self.refresh(values_NC)
        if column_bits is None:
            self.patterns.row_bits = None

    # -- state --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, values_NC: torch.Tensor) -> None:
        """New values, same patterns: after every optimizer step."""
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

    @torch.no_grad()
    def set_column_pattern(self, column_bits: torch.Tensor, values_NC: torch.Tensor) -> None:
        """A new second pruning: its bitmask, which is kept and not copied."""
        self.patterns.column_bits = column_bits.contiguous()
        if Product.DGRAD in self.sparse:
            self.sparse[Product.DGRAD].set_metadata()
        self.refresh(values_NC)

    # -- choices ------------------------------------------------------------------------------------------------------

    def operand(self, product: Product, tokens: int) -> WeightOperand:
        """What a product of so many tokens reads; chosen now, and brought into its form, if need be."""
        present = self.sparse.get(product)
        if present is None:
            raise not_held(product)
        if isinstance(present, AugmentedOperand):
            return present
        key = Key(product, *self.patterns.shape(product), tokens, self.patterns.dtype)
        choice = choices.find(key)
        if choice is None:
            return uncompiled(self._adopt)(key)
        return self._in_form_of(choice, product) or uncompiled(self._adopt)(key)

    def _in_form_of(self, choice: Choice, product: Product) -> WeightOperand | None:
        """The operand that a choice runs on; None: it is not in that form yet."""
        present = self.sparse[product]
        if not choice.sparse:
            # Inference keeps no dense copy: its model would be larger than a dense one.
            return self.dense.get(product) if self._may_be_dense else present
        if choice.library in (None, present.library):
            return present if present.fits(choice) else None
        return present if self.among and choice.library not in self.among else None

    @property
    def _may_be_dense(self) -> bool:
        return self.dense_allowed and self.patterns.row_bits is not None

    @torch.no_grad()
    def _adopt(self, key: Key) -> WeightOperand:
        """Make the choice if need be, and bring this weight's operand into the form that it wants."""
        allowed, device = self.dense_allowed, self.patterns.device
        measured = functools.partial(measure.measure, key, device, dense_allowed=allowed, among=self.among)
        choice = resolve(key, device, measured, on_cpu=Choice(True))
        if self._in_form_of(choice, key.product) is None:
            present = self.sparse[key.product]
            if not choice.sparse:
                self.dense[key.product] = DenseOperand(self.patterns, key.product, self._values())
            elif choice.library in (None, present.library):
                present.adopt(choice)
            else:
                self._replace(key.product, LIBRARIES[choice.library].Operand(self.patterns, key.product))
        found = self._in_form_of(choice, key.product)
        assert found is not None
        return found

    def _replace(self, product: Product, operand: SparseOperand) -> None:
        operand.set_values(self._values())
        self.sparse[product] = operand

    def _values(self) -> torch.Tensor:
        """`[N, C]`, as the operands have them: the caller's may have changed since the last refresh."""
        return self.sparse[Product.FORWARD].packed_values() if self.borrowed_NC is None else self.borrowed_NC

    # -- products -----------------------------------------------------------------------------------------------------

    def product(self, product: Product, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """X W^T (+ bias), `[T, R]`, W the operand of a product."""
        return self.operand(product, x_TS.shape[0]).product(x_TS, bias_R)

    def add(
        self, product: Product, x_TS: torch.Tensor, y_TR: torch.Tensor, bias_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Y + X W^T (+ bias), in the place of Y."""
        return self.operand(product, x_TS.shape[0]).add(x_TS, y_TR, bias_R)

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Y = X (W^R)^T, `[T, N]`."""
        return self.product(Product.FORWARD, x_TK)

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dX = dY W^{R,C}, `[T, K]`."""
        return self.product(Product.DGRAD, dy_TN)

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None) -> torch.Tensor:
        """dW = dY^T X at the kept places, `[N, C]`; with an rng P(dY)^T X, or the exact one where that is faster."""
        row_bits = self.patterns.row_bits
        if row_bits is None:
            raise not_held(Product.WGRAD)
        if rng is None:
            return products.gather_kept(dy_TN.t() @ x_TK, row_bits)
        return wgrad.packed(dy_TN, x_TK, row_bits, rng, dense_allowed=self.dense_allowed, among=self.wgrad_among)

    def with_bias(self, bias_N: torch.Tensor) -> WithBias:
        """These operands with a bias added by the forward product's epilogue."""
        return WithBias(self, bias_N)

    # -- adapters -----------------------------------------------------------------------------------------------------

    def augmented(self, product: Product) -> AugmentedOperand | None:
        """The operand of a product if it has adapters in it."""
        operand = self.sparse.get(product)
        return operand if isinstance(operand, AugmentedOperand) else None

    def can_augment(self, product: Product, tokens: int, rank: int) -> bool:
        """Whether adapters may go into an operand: where it is the library's own, in a layout that we know."""
        plain = choices.find(Key(product, *self.patterns.shape(product), tokens, self.patterns.dtype))
        if plain is not None and (not plain.sparse or plain.library not in (None, CusparseltOperand.library)):
            return False
        known = layout.probe(self.patterns.device, self.patterns.dtype).known_metadata
        return isinstance(self.sparse.get(product), CusparseltOperand) and rank % 4 == 0 and known

    @torch.no_grad()
    def augmented_copy(self, product: Product, strategy: Strategy, rank: int) -> AugmentedOperand:
        """An operand with room for adapters, beside the plain one; where `can_augment`."""
        plain = self.sparse[product]
        assert isinstance(plain, CusparseltOperand)
        return AugmentedOperand(plain, strategy, rank)

    def augment(self, product: Product, strategy: Strategy, rank: int) -> None:
        """Put an operand with room for adapters in the place of the plain one, and of its dense copy."""
        self.sparse[product] = self.augmented_copy(product, strategy, rank)
        self.dense.pop(product, None)
