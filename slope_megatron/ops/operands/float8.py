"""Products in e4m3: forward and dgrad on 2:4 tensor cores at twice the 16-bit rate, wgrad on dense ones.

N out, K in, C = K/2 kept per row, T tokens; q(.) rounds to e4m3 with one power-of-two scale a tensor, taken from its
present largest magnitude (`sparsity.float8`).
    forward   Y  = q(X) q(W^R)^T
    dgrad     dX = q(dY) q(W^{R,C})
    wgrad     dW = q(dY)^T q(X) gathered; or in 16 bits, dW = (dY^T X) gathered
The parameter stays packed in 16 bits: `refresh` rounds it into both operands, once a step. What is rounded is the same
wherever it runs; which kernel multiplies, 2:4 or dense, is measured.
"""

import functools
import math

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from slope_megatron.ops import choices
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.autotune.resolve import resolve, uncompiled
from slope_megatron.ops.choices import PRODUCTS, Choice, Key, Product
from slope_megatron.ops.custom_ops import float8 as float8_products
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.ops.operands import cusparselt
from slope_megatron.ops.operands.bias import WithBias
from slope_megatron.ops.operands.protocol import WeightPatterns
from slope_megatron.ops.operands.reference import ReferenceOperands
from slope_megatron.sparsity import float8
from slope_megatron.sparsity.float8 import E4M3
from slope_megatron.sparsity.mvue_rng import MvueRng
from slope_megatron.sparsity.operand import metadata_e4m3, scatter_slots

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


class Float8Operands:
    """Operand buffers of one weight; see the module's docstring."""

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
        self.patterns = WeightPatterns.of(values_NC, row_bits, column_bits)
        self.dtype, self.device = values_NC.dtype, values_NC.device
        self.float8_wgrad, self.dense_allowed = wgrad, dense_allowed
        size = layout.operand_bytes(self.patterns.rows, self.patterns.columns, E4M3)
        self.operands = {
            product: torch.empty(size, dtype=torch.uint8, device=self.device)
            for product in (Product.FORWARD, Product.DGRAD)
            if product in products_wanted
        }
        self.scale = torch.empty(1, dtype=torch.float32, device=self.device)
        # Of a product that measured faster on dense tensor cores: its weight, as [rows, columns] of the operand.
        self.dense: dict[Product, torch.Tensor] = {}
        # The product of both factors' scales is to be 2^target; see `_aim`.
        self.targets = dict.fromkeys((Product.FORWARD, Product.DGRAD), SAFE_TARGET)
        self._aimed: set[Product] = set()
        self.resident = set(products_wanted) == set(PRODUCTS)
        # From a dgrad to the wgrad of the same dY; gone with dY itself where no wgrad comes.
        self._transposed = WeakTensorKeyDictionary()
        self._write_metadata(Product.FORWARD)
        self.set_column_pattern(column_bits, values_NC)

    # -- state --------------------------------------------------------------------------------------------------------

    def _write_metadata(self, product: Product) -> None:
        """Once a pattern: our kernels' metadata of 16-bit operands, put in order; or, where that is another, unknown
        one, the library's."""
        if product not in self.operands:
            return
        rows, columns = self.patterns.shape(product)
        if layout.probe(self.device, E4M3).known_metadata:
            metadata = metadata_e4m3(self.patterns.metadata_sm90(product), rows, columns // 4)
        else:
            metadata = layout.library_metadata(self.patterns.places(product), E4M3)
        layout.metadata_of(self.operands[product], rows, columns, 1).copy_(metadata[None])

    @torch.no_grad()
    def refresh(self, values_NC: torch.Tensor) -> None:
        """New values, same patterns."""
        buffers = (self.operands.get(Product.FORWARD), self.operands.get(Product.DGRAD))
        float8_products.refresh_(values_NC, *self.patterns.both(), *buffers, self.scale)
        for product in self.dense:
            self.dense[product].copy_(self._unpacked(product))

    @torch.no_grad()
    def set_column_pattern(self, column_bits: torch.Tensor, values_NC: torch.Tensor) -> None:
        """A new second pruning: its bitmask, which is kept and not copied."""
        self.patterns.column_bits = column_bits.contiguous()
        self._write_metadata(Product.DGRAD)
        self.refresh(values_NC)
        self._aimed.clear()

    # -- choices ------------------------------------------------------------------------------------------------------

    def _runs_dense(self, product: Product, tokens: int) -> bool:
        """Whether a product of so many tokens reads the dense copy; chosen now, and the copy made, if need be."""
        key = Key(product, *self.patterns.shape(product), tokens, E4M3)
        choice = choices.find(key)
        if choice is None or (self._is_dense(choice) and product not in self.dense):
            choice = uncompiled(self._adopt)(key)
        return self._is_dense(choice)

    def _is_dense(self, choice: Choice) -> bool:
        """A choice that another backend's operands made, in this process, may be one that is not allowed here."""
        return self.dense_allowed and not choice.sparse

    @torch.no_grad()
    def _adopt(self, key: Key) -> Choice:
        """Make the choice if need be, and the dense copy if it wants one."""
        allowed = self.dense_allowed
        measured = functools.partial(measure.measure, key, self.device, dense_allowed=allowed, among=("cusparselt",))
        choice = resolve(key, self.device, measured, on_cpu=Choice(True))
        if self._is_dense(choice) and key.product not in self.dense:
            self.dense[key.product] = self._unpacked(key.product)
        return choice

    def _unpacked(self, product: Product) -> torch.Tensor:
        """The operand as a dense e4m3 matrix."""
        rows, columns = self.patterns.shape(product)
        values = layout.values_of(self.operands[product], rows, columns, 1, E4M3)[0]
        return scatter_slots(values, self.patterns.places(product))

    # -- products -----------------------------------------------------------------------------------------------------

    def _product(self, product: Product, q: torch.Tensor, scale: torch.Tensor, tokens: int, bias=None) -> torch.Tensor:
        if self._runs_dense(product, tokens):
            y = float8_products.dense_mm(q, self.dense[product], scale, self.scale, bias, self.dtype)
        else:
            rows = self.patterns.shape(product)[0]
            arguments = (q, scale, rows, bias, self.dtype, self.targets[product])
            y = float8_products.sparse_mm(self.operands[product], self.scale, *arguments)
        return y[:tokens]

    def _aim(self, product: Product, x: torch.Tensor) -> None:
        """Choose the power of two that the product of both scales is to be, from the present input.

        It is the factor that the host hands to the product; as long as the input's scale can be chosen to meet it, by
        at most SLACK binades, the product needs no second pass. A matter of speed, once a weight and after each new
        pattern, because it waits for the GPU. Not where results must come again to the bit after a resume (what is
        aimed rounds the smallest values otherwise), nor in fp16, whose range a missed aim could leave.
        """
        unwanted = self.dtype != torch.bfloat16 or not self.resident or torch.are_deterministic_algorithms_enabled()
        if product in self._aimed or unwanted or torch.compiler.is_compiling() or self.device.type == "cpu":
            return
        if torch.cuda.is_current_stream_capturing():
            return
        scale = float(float8_products.quantize(x, True, False)[2] * self.scale)
        if not math.isfinite(scale):
            return  # a step that went wrong says nothing of those to come
        self._aimed.add(product)
        if scale > 2.0**-100:
            self.targets[product] = round(math.log2(scale)) + HEADROOM

    def _quantized(self, product: Product, x: torch.Tensor, transposed: bool):
        self._aim(product, x)
        return float8_products.quantize(x, True, transposed, self.scale, self.targets[product])

    def forward(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Y = q(X) q(W^R)^T (+ bias), `[T, N]`."""
        q_TK, _, scale = self._quantized(Product.FORWARD, x_TK, False)
        return self._product(Product.FORWARD, q_TK, scale, x_TK.shape[0], bias_N)

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dX = q(dY) q(W^{R,C}), `[T, K]`. One reading of dY also gives the transposed q(dY) that wgrad will want."""
        with_transposed = self.float8_wgrad and not torch.compiler.is_compiling()
        q_TN, q_NT, scale = self._quantized(Product.DGRAD, dy_TN, with_transposed)
        if with_transposed:
            self._transposed[dy_TN] = (q_NT, scale, dy_TN._version)
        return self._product(Product.DGRAD, q_TN, scale, dy_TN.shape[0])

    def _transposed_gradient(self, dy_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transposed q(dY) and its scale: dgrad's, where it has read this very tensor."""
        if not torch.compiler.is_compiling():
            q_NT, scale, version = self._transposed.pop(dy_TN, (None, None, None))
            if q_NT is not None and version == dy_TN._version:
                return q_NT, scale
        return float8_products.quantize(dy_TN, False, True)[1:]

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None) -> torch.Tensor:
        """dW at the kept places, `[N, C]`."""
        assert rng is None, "SlopeConfig refuses mode full in e4m3"
        if not self.float8_wgrad:
            return products.gather_kept(dy_TN.t() @ x_TK, self.patterns.both()[0])
        q_NT, dy_scale = self._transposed_gradient(dy_TN)
        _, q_KT, x_scale = float8_products.quantize(x_TK, False, True)
        dw_NK = float8_products.dense_mm(q_NT, q_KT, dy_scale, x_scale, None, self.dtype)
        return products.gather_kept(dw_NK, self.patterns.both()[0])

    def product(self, product: Product, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """X W^T (+ bias), `[T, R]`, W the operand of a product."""
        return self.forward(x_TS, bias_R) if product is Product.FORWARD else self.dgrad(x_TS)

    def with_bias(self, bias_N: torch.Tensor) -> WithBias:
        """These operands with a bias added by the forward product's epilogue."""
        return WithBias(self, bias_N)


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

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None) -> torch.Tensor:
        if self.float8_wgrad:
            dy_TN, x_TK = float8.rounded(dy_TN), float8.rounded(x_TK)
        return super().wgrad(dy_TN, x_TK, rng)
