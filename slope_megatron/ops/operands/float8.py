"""Products in e4m3: forward and dgrad on 2:4 tensor cores at twice the 16-bit rate, wgrad on dense ones.

N out, K in, C = K/2 kept per row, T tokens; q(.) rounds to e4m3 with one power-of-two scale a tensor, taken from its
present largest magnitude (`sparsity.float8`).
    forward   Y  = q(X) q(W^R)^T
    dgrad     dX = q(dY) q(W^{R,C})
    wgrad     dW = q(dY)^T q(X) gathered; or in 16 bits, dW = (dY^T X) gathered
The parameter stays packed in 16 bits: `refresh` rounds it into both operands, once a step. What is rounded is the same
wherever it runs; which kernel multiplies, 2:4 or dense, is measured.
"""

import math

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from slope_megatron.ops import update
from slope_megatron.ops.choices import PRODUCTS, Choice, Product
from slope_megatron.ops.custom_ops import float8 as float8_products
from slope_megatron.ops.custom_ops import layout
from slope_megatron.ops.operands import cusparselt
from slope_megatron.ops.operands.measured import MeasuredOperands
from slope_megatron.ops.operands.protocol import WeightPatterns
from slope_megatron.ops.operands.reference import ReferenceOperands
from slope_megatron.sparsity import float8
from slope_megatron.sparsity.float8 import E4M3
from slope_megatron.sparsity.mvue_rng import MvueRng
from slope_megatron.sparsity.operand import indices_e4m3, metadata_e4m3, scatter_slots

OLDEST_ARCHITECTURE = (8, 9)
# 512^-2: sums of up to 2^18 products of e4m3 numbers, times it, stay in the range of fp16.
SAFE_TARGET = -18
# An aim leaves so many binades for values to grow.
HEADROOM = 2


def unsupported() -> str | None:
    """Why this machine cannot run it; None: it can."""
    reason = cusparselt.unsupported()
    if reason:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_ARCHITECTURE:
        return f"sm_{capability[0]}{capability[1]} has no e4m3 units; they came with sm_89 (L40S) and sm_90 (H100)"
    return None


def unsupported_weight(values_NC: torch.Tensor, row_bits: torch.Tensor) -> str | None:
    """Why this weight cannot have operands here; None: it can."""
    reason = cusparselt.unsupported_weight(values_NC, row_bits)
    if reason:
        return reason
    refused = layout.probe(values_NC.device, E4M3).refused
    return f"cuSPARSELt {refused}" if refused else None


class Float8Operand:
    """One product's operand: a buffer of e4m3 values, then metadata. R rows, S columns."""

    library = cusparselt.NAME

    def __init__(self, patterns: WeightPatterns, product: Product):
        """Values are not set yet."""
        self.patterns, self.of = patterns, product
        self.rows, self.columns = patterns.shape(product)
        size = layout.operand_bytes(self.rows, self.columns, E4M3)
        self.buffer = torch.empty(size, dtype=torch.uint8, device=patterns.device)
        self.set_metadata()

    def fits(self, choice: Choice) -> bool:
        """It has one layout, for every choice."""
        return True

    def set_metadata(self) -> None:
        """Once a pattern: our kernels' metadata of 16-bit operands, put in order; or, where the device's layout is
        unknown, the library's."""
        if layout.probe(self.patterns.device, E4M3).known_metadata:
            metadata = metadata_e4m3(self.patterns.metadata_sm90(self.of), self.rows, self.columns // 4)
        else:
            metadata = layout.library_metadata(self.patterns.indices(self.of), E4M3)
        layout.metadata_of(self.buffer, self.rows, self.columns, 1).copy_(metadata[None])

    def matrix(self) -> torch.Tensor:
        """W `[R, S]` with its zeros. Nothing waits for the device where we can read the metadata."""
        values = layout.values_of(self.buffer, self.rows, self.columns, 1, E4M3)[0]
        if not layout.probe(self.patterns.device, E4M3).known_metadata:
            return scatter_slots(values, self.patterns.indices(self.of))
        metadata = layout.metadata_of(self.buffer, self.rows, self.columns, 1)[0]
        return scatter_slots(values, indices_e4m3(metadata, self.rows, self.columns // 4))

    def product(self, q_TS, q_scale, w_scale, bias_R, output: torch.dtype, target: int) -> torch.Tensor:
        return float8_products.sparse_mm(self.buffer, w_scale, q_TS, q_scale, self.rows, bias_R, output, target)


class DenseFloat8Operand:
    """The same as a dense matrix."""

    def __init__(self, operand: Float8Operand):
        self.operand, self.matrix_RS = operand, operand.matrix()

    def refresh(self) -> None:
        """The operand has new values."""
        self.matrix_RS.copy_(self.operand.matrix())

    def product(self, q_TS, q_scale, w_scale, bias_R, output: torch.dtype, target: int) -> torch.Tensor:
        return float8_products.dense_mm(q_TS, self.matrix_RS, q_scale, w_scale, bias_R, output)


class Float8Operands(MeasuredOperands[Float8Operand, DenseFloat8Operand]):
    """Operands of one weight; see the module's docstring."""

    def __init__(
        self, values_NC, row_bits, column_bits, *, wgrad: bool, dense_allowed: bool = True, products_wanted=PRODUCTS
    ):
        """
        Args:
            row_bits, column_bits: bitmasks uint8 `[N, K/8]` and `[N, C/8]`, kept and not copied.
            wgrad: whether wgrad is in e4m3 too.
            dense_allowed: whether a product may fall to the dense candidate.
            products_wanted: those that will be asked for; the operand of another one is not there.
        """
        patterns = WeightPatterns.of(values_NC, row_bits, column_bits)
        super().__init__(patterns, E4M3, dense_allowed=dense_allowed, among=(cusparselt.NAME,))
        self.output, self.float8_wgrad = values_NC.dtype, wgrad
        for product in (Product.FORWARD, Product.DGRAD):
            if product in products_wanted:
                self.sparse[product] = Float8Operand(patterns, product)
        self.scale = torch.empty(1, dtype=torch.float32, device=patterns.device)
        # The product of both factors' scales is to be 2^target; see `_aim`.
        self.targets = dict.fromkeys((Product.FORWARD, Product.DGRAD), SAFE_TARGET)
        self._aimed: set[Product] = set()
        self.resident = set(products_wanted) == set(PRODUCTS)
        # From a dgrad to the wgrad of the same dY; gone with dY itself where no wgrad comes.
        self._transposed = WeakTensorKeyDictionary()
        # From `rounded_input` to the forward product of the same X.
        self._rounded = WeakTensorKeyDictionary()
        self.refresh(values_NC)

    # -- state --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, values_NC: torch.Tensor) -> None:
        """New values, same patterns: rounded for both products at once, with one scale."""
        forward, backward = (self.sparse.get(product) for product in (Product.FORWARD, Product.DGRAD))
        buffers = (operand.buffer if operand else None for operand in (forward, backward))
        float8_products.refresh_(values_NC, *self.patterns.both(), *buffers, self.scale)
        for dense in self.dense.values():
            dense.refresh()

    def set_column_pattern(self, column_bits: torch.Tensor, values_NC: torch.Tensor) -> None:
        super().set_column_pattern(column_bits, values_NC)
        self._aimed.clear()

    def change_layout(self, choice: Choice, product: Product) -> None:
        raise AssertionError(f"{choice} is none of cuSPARSELt's for {product} in e4m3")

    def dense_copy(self, product: Product) -> DenseFloat8Operand:
        return DenseFloat8Operand(self.sparse[product])

    # -- products -----------------------------------------------------------------------------------------------------

    def _aim(self, product: Product, x: torch.Tensor) -> None:
        """Choose the power of two that the product of both scales is to be, from the present input.

        It is the factor that the host hands to the product; as long as the input's scale can be chosen to meet it, by
        at most SLACK binades, the product needs no second pass. A matter of speed, once a weight and after each new
        pattern, because it waits for the GPU. Not where results must come again to the bit after a resume (what is
        aimed rounds the smallest values otherwise), nor in fp16, whose range a missed aim could leave.
        """
        unwanted = self.output != torch.bfloat16 or not self.resident or torch.are_deterministic_algorithms_enabled()
        if product in self._aimed or unwanted or torch.compiler.is_compiling() or self.patterns.device.type == "cpu":
            return
        if torch.cuda.is_current_stream_capturing():
            return
        scale = float(float8_products.quantize(x, True, False)[2] * self.scale)
        if not math.isfinite(scale):
            return  # a step that went wrong says nothing of those to come
        self._aimed.add(product)
        if scale > 2.0**-100:
            self.targets[product] = round(math.log2(scale)) + HEADROOM

    def product(self, product: Product, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """q(X) W^T (+ bias), `[T, R]`. dgrad reads dY once for itself and for the q(dY)^T that wgrad will want."""
        q_TS, scale = self._rounded_already(product, x_TS)
        if q_TS is None:
            transposed = product is Product.DGRAD and self.float8_wgrad and not torch.compiler.is_compiling()
            q_TS, q_ST, scale = self._quantize(product, x_TS, transposed)
            if transposed:
                self._transposed[x_TS] = (q_ST, scale, x_TS._version)
        # What it was rounded for: the first input chooses the target.
        tokens, target = x_TS.shape[0], self.targets[product]
        return self.operand(product, tokens).product(q_TS, scale, self.scale, bias_R, self.output, target)[:tokens]

    def _quantize(self, product: Product, x_TS: torch.Tensor, transposed: bool):
        self._aim(product, x_TS)
        return float8_products.quantize(x_TS, True, transposed, self.scale, self.targets[product])

    def rounded_input(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """q(X)^T `[K, T']` and its scale `[1]`: all that wgrad needs of X, in half of its bytes, and X is read once.

        The row-major q(X) waits for the forward product of this X. None: wgrad multiplies X itself.
        """
        if not self.float8_wgrad or torch.compiler.is_compiling():
            return None
        q_TK, q_KT, scale = self._quantize(Product.FORWARD, x_TK, True)
        self._rounded[x_TK] = (q_TK, scale)
        return q_KT, scale

    def _rounded_already(self, product: Product, x_TS: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if product is not Product.FORWARD or torch.compiler.is_compiling():
            return None, None
        return self._rounded.pop(x_TS, (None, None))

    def _transposed_gradient(self, dy_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transposed q(dY) and its scale: dgrad's, where it has read this very tensor."""
        if not torch.compiler.is_compiling():
            q_NT, scale, version = self._transposed.pop(dy_TN, (None, None, None))
            if q_NT is not None and version == dy_TN._version:
                return q_NT, scale
        return float8_products.quantize(dy_TN, False, True)[1:]

    def wgrad(
        self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None, total: torch.Tensor | None = None
    ):
        """dW at the kept positions, `[N, C]`."""
        assert rng is None, "SlopeConfig refuses mode full in e4m3"
        if not self.float8_wgrad:
            return update.kept(dy_TN.t() @ x_TK, self.patterns.both()[0], total)
        _, q_KT, scale = float8_products.quantize(x_TK, False, True)
        return self.wgrad_of_rounded(dy_TN, q_KT, scale, total)

    def wgrad_of_rounded(
        self, dy_TN: torch.Tensor, q_KT: torch.Tensor, x_scale: torch.Tensor, total: torch.Tensor | None = None
    ):
        """The same of an input that `rounded_input` has rounded."""
        q_NT, dy_scale = self._transposed_gradient(dy_TN)
        dw_NK = float8_products.dense_mm(q_NT, q_KT, dy_scale, x_scale, None, self.output)
        return update.kept(dw_NK, self.patterns.both()[0], total)


class EmulatedFloat8Operands(ReferenceOperands):
    """The same products on any device: matrices rounded to e4m3 and multiplied as what they are, 16 bits or more."""

    def __init__(self, row_NK: torch.Tensor, dtype: torch.dtype, products: tuple[Product, ...], *, wgrad: bool):
        super().__init__(row_NK, dtype, products)
        self.float8_wgrad = wgrad

    def refresh(self, values_NC: torch.Tensor) -> None:
        super().refresh(float8.rounded(values_NC))

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return super().forward(float8.rounded(x_TK))

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        return super().dgrad(float8.rounded(dy_TN))

    def wgrad(
        self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None, total: torch.Tensor | None = None
    ):
        if self.float8_wgrad:
            dy_TN, x_TK = float8.rounded(dy_TN), float8.rounded(x_TK)
        return super().wgrad(dy_TN, x_TK, rng, total)
