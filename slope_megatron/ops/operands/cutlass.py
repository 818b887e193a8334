"""The `cutlass` backend: every sparse product by our own kernels, the forward one on the parameter's own memory.

N out, K in, C = K/2 kept per row, T tokens.
    forward   Y  = X (W^R)^T           values: the packed parameter [N, C] itself; beside it metadata alone
    dgrad     dX = dY W^{R,C}          values: the transposed W^{R,C} [K, N/2], a copy, rewritten by each refresh
    wgrad     dW = (dY^T X) gathered; with draws that of P(dY)^T X, packed by the product's epilogue
So a weight has no forward operand: 1 byte a dense weight less than with cuSPARSELt. The price is that the forward
product reads what the parameter holds when it runs, and that it must know where the parameter is now: see `rebind`.
"""

import sys

import torch

from slope_kernels import cutlass
from slope_megatron.ops import choices
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.ops.custom_ops import products
from slope_megatron.ops.operands import patterns, reference, wgrad
from slope_megatron.ops.operands.bias import BiasedOperands
from slope_megatron.ops.operands.cutlass_operand import CutlassOperand, column_metadata, row_metadata
from slope_megatron.ops.operands.reference import held
from slope_megatron.sparsity.packing import pack_bits
from slope_megatron.sparsity.token_draws import TokenDraws


def unsupported() -> str | None:
    """Why this machine cannot run it; None: it can."""
    return cutlass.unsupported() or patterns.without_triton()


def unsupported_weight(values_NC: torch.Tensor, row_bits: torch.Tensor) -> str | None:
    """Why this weight cannot have operands here; None: it can."""
    return patterns.no_operand(values_NC, row_bits, cutlass.unsupported_shape)


def build(values_NC, row_bits, column_bits, products_wanted=reference.PRODUCTS) -> "CutlassOperands":
    return CutlassOperands(values_NC, row_bits, column_bits, products_wanted)


class CutlassOperands:
    """Buffers of one weight; see the module's docstring."""

    def __init__(
        self,
        values_NC: torch.Tensor,
        row_bits: torch.Tensor,
        column_bits: torch.Tensor | None = None,
        products_wanted: tuple[str, ...] = reference.PRODUCTS,
    ):
        """
        Args:
            row_bits, column_bits: bitmasks uint8 `[N, K/8]` and `[N, C/8]`, kept and not copied. Without a column
                bitmask there is the forward product alone, and neither is kept.
            products_wanted: those that will be asked for; the operand of another one is not there.
        """
        self.rows, self.columns = row_bits.shape[0], row_bits.shape[1] * 8
        self.dtype, self.device = values_NC.dtype, values_NC.device
        self.operands: dict[str, CutlassOperand] = {}
        if "forward" in products_wanted:
            self.operands["forward"] = CutlassOperand(values_NC, row_metadata(row_bits))
        self.row_bits = self.column_bits = None
        if column_bits is not None:
            self.row_bits, self.column_bits = row_bits.contiguous(), column_bits.contiguous()
            if "dgrad" in products_wanted:
                values_KN = values_NC.new_empty(self.columns, self.rows // 2)
                self.operands["dgrad"] = CutlassOperand(values_KN, column_metadata(self.row_bits, self.column_bits))
        self.refresh(values_NC)

    # -- state --------------------------------------------------------------------------------------------------------

    def rebind(self, values_NC: torch.Tensor) -> None:
        """The parameter is here now. Cheap: optimizers move parameters into flat buffers, and ZeRO-3 at every use."""
        if "forward" in self.operands:
            self.operands["forward"].values_RC = values_NC

    @torch.no_grad()
    def refresh(self, values_NC: torch.Tensor) -> None:
        """New values, same patterns."""
        self.rebind(values_NC)
        if "dgrad" in self.operands:
            backward = self.operands["dgrad"].values_RC.view(-1).view(torch.uint8)
            products.refresh_(values_NC, self.row_bits, self.column_bits, None, backward, 1, 1)

    @torch.no_grad()
    def set_column_pattern(self, column_NC: torch.Tensor, values_NC: torch.Tensor) -> None:
        """A new second pruning: bool `[N, C]` or its bitmask, which is kept and not copied."""
        self.column_bits = (pack_bits(column_NC) if column_NC.dtype == torch.bool else column_NC).contiguous()
        if "dgrad" in self.operands:
            row_bits = held(self.row_bits, "dgrad")
            self.operands["dgrad"].metadata.copy_(column_metadata(row_bits, self.column_bits))
        self.refresh(values_NC)

    # -- products -----------------------------------------------------------------------------------------------------

    def _ready(self, kind: str, tokens: int) -> CutlassOperand:
        """The operand of a product whose kernel has been chosen, now if need be."""
        shape = (self.rows, self.columns) if kind == "forward" else (self.columns, self.rows)
        key = Key(kind, *shape, tokens, self.dtype)
        if choices.find(key) is None:
            # Measuring is not for torch.compile to trace.
            decide = torch.compiler.disable(self._decide) if "torch._dynamo" in sys.modules else self._decide
            decide(key)
        return self.operands[kind]

    @torch.no_grad()
    def _decide(self, key: Key) -> None:
        if self.device.type == "cpu":
            choices.record(key, Choice(True))
            return
        choices.refuse_while_capturing(key, self.device)
        choices.decide(key, lambda: measure.measure(key, self.device, dense_allowed=False, libraries=("cutlass",)))

    def forward(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Y = X (W^R)^T (+ bias), `[T, N]`."""
        return self._ready("forward", x_TK.shape[0]).product(x_TK, bias_N)

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dX = dY W^{R,C}, `[T, K]`."""
        return self._ready("dgrad", dy_TN.shape[0]).product(dy_TN)

    def forward_add(self, x_TK: torch.Tensor, y_TN: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Y + X (W^R)^T (+ bias), in the place of Y."""
        return self._ready("forward", x_TK.shape[0]).add(x_TK, y_TN, bias_N)

    def dgrad_add(self, dy_TN: torch.Tensor, dx_TK: torch.Tensor) -> torch.Tensor:
        """dX + dY W^{R,C}, in the place of dX."""
        return self._ready("dgrad", dy_TN.shape[0]).add(dy_TN, dx_TK)

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, draws: TokenDraws | None = None) -> torch.Tensor:
        """dW = dY^T X at the kept places, `[N, C]`; with draws P(dY)^T X."""
        if draws is None:
            return products.gather_kept(dy_TN.t() @ x_TK, self.row_bits)
        row_bits = held(self.row_bits, "wgrad")
        return wgrad.packed(dy_TN, x_TK, row_bits, draws, dense_allowed=False, libraries=("cutlass",))

    def with_bias(self, bias_N: torch.Tensor) -> BiasedOperands:
        """These operands with a bias added by the forward product's epilogue."""
        return BiasedOperands(self, bias_N)
