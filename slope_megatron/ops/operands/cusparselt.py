"""The `cusparselt` backend: products on 2:4 tensor cores, wgrad read at the kept places.

N out, K in, C = K/2 kept per row, T tokens.
    forward   Y  = X (W^R)^T           operand W^R [N, K]
    dgrad     dX = dY W^{R,C}          operand (W^{R,C})^T [K, N]
    wgrad     dW = (dY^T X) gathered; with draws that of P(dY)^T X, see `ops.wgrad`
Operands are a copy of the values and metadata that depends on the patterns alone: a refresh moves values only. Where a
measurement favours the dense product, a dense copy of that operand is kept beside it. Where it favours one of our own
kernels (under `auto` alone), the operand is handed over to it: the forward one is let go, since that kernel reads the
parameter itself; the backward one keeps its values alone, with metadata in CUTLASS's order beside it.
"""

import sys

import torch

from slope_kernels import cusparselt, cusparselt_library
from slope_megatron.ops import choices
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.ops.operands import patterns, reference, wgrad
from slope_megatron.ops.operands.augmented import JoinedOperand
from slope_megatron.ops.operands.bias import BiasedOperands
from slope_megatron.ops.operands.cutlass_operand import CutlassOperand, column_metadata, hand_over
from slope_megatron.ops.operands.reference import held
from slope_megatron.sparsity.operand import backward_slots, slot_places
from slope_megatron.sparsity.packing import pack_bits, unpack_bits
from slope_megatron.sparsity.token_draws import TokenDraws


def unsupported() -> str | None:
    """Why this machine cannot run it; None: it can."""
    return cusparselt_library.unsupported() or patterns.without_triton()


def unsupported_weight(values_NC: torch.Tensor, row_bits: torch.Tensor) -> str | None:
    """Why this weight cannot have operands here; None: it can."""
    reason = patterns.no_operand(values_NC, row_bits, cusparselt.unsupported_shape)
    if reason:
        return reason
    refused = layout.probe(values_NC.device, values_NC.dtype).refused
    return f"cuSPARSELt {refused}" if refused else None


def build(
    values_NC,
    row_bits,
    column_bits,
    *,
    dense_allowed: bool = True,
    products_wanted: tuple[str, ...] = reference.PRODUCTS,
) -> "CusparseltOperands":
    return CusparseltOperands(
        values_NC, row_bits, column_bits, dense_allowed=dense_allowed, products_wanted=products_wanted
    )


class CusparseltOperands:
    """Operand buffers of one weight; see the module's docstring."""

    def __init__(
        self, values_NC, row_bits, column_bits, *, dense_allowed: bool = True, products_wanted=reference.PRODUCTS
    ):
        """
        Args:
            row_bits, column_bits: bitmasks uint8 `[N, K/8]` and `[N, C/8]`, kept and not copied.
            dense_allowed: whether a product may fall to the dense candidate.
            products_wanted: those that will be asked for; the operand of another one is not there.
        """
        self.rows, self.columns = row_bits.shape[0], row_bits.shape[1] * 8
        self.row_bits, self.column_bits = row_bits.contiguous(), column_bits.contiguous()
        self.dtype, self.device = values_NC.dtype, values_NC.device
        self.dense_allowed = dense_allowed
        size = layout.operand_bytes(self.rows, self.columns)

        def operand(product: str) -> torch.Tensor | None:
            return torch.empty(size, dtype=torch.uint8, device=self.device) if product in products_wanted else None

        self.forward_operand, self.backward_operand = operand("forward"), operand("dgrad")
        # Without the forward operand the values are here no longer than these operands.
        self.passing_NC = values_NC if self.forward_operand is None else None
        self.tiles = {"forward": 1, "dgrad": 1}
        # By kind: operands with adapters in them, in the place of the plain ones.
        self.joined: dict[str, JoinedOperand] = {}
        # By kind: those that our own kernels run. Operands that pass with their use are not worth the handing over.
        self.handed_over: dict[str, CutlassOperand] = {}
        lasting = dense_allowed and set(products_wanted) == set(reference.PRODUCTS)
        self.libraries: tuple[str, ...] = () if lasting else ("cusparselt",)
        self.dense_forward_NK: torch.Tensor | None = None
        self.dense_backward_NK: torch.Tensor | None = None
        self._write_row_metadata()
        self._write_column_metadata(values_NC)
        self.refresh(values_NC)

    # -- state --------------------------------------------------------------------------------------------------------

    def _write_row_metadata(self) -> None:
        if self.forward_operand is None:
            return
        if layout.probe(self.device, self.dtype).known_metadata:
            metadata = products.row_metadata(self.row_bits)
        else:
            metadata = layout.library_metadata(slot_places(unpack_bits(self.row_bits)), self.dtype)
        layout.metadata_of(self.forward_operand, self.rows, self.columns, 1).copy_(metadata[None])

    def _write_column_metadata(self, values_NC) -> None:
        if "dgrad" in self.handed_over:
            self.handed_over["dgrad"].metadata.copy_(column_metadata(self.row_bits, self.column_bits))
            return
        if self.backward_operand is None and "dgrad" not in self.joined:
            return
        if layout.probe(self.device, self.dtype).known_metadata:
            metadata = products.column_metadata(self.row_bits, self.column_bits)
        else:
            survives = unpack_bits(self.column_bits)
            _, places = backward_slots(values_NC, unpack_bits(self.row_bits), survives)
            metadata = layout.library_metadata(places, self.dtype)
        if "dgrad" in self.joined:
            self.joined["dgrad"].set_metadata(metadata)
        elif self.backward_operand is not None:
            target = layout.metadata_of(self.backward_operand, self.columns, self.rows, self.tiles["dgrad"])
            target.copy_(metadata.view_as(target))

    @torch.no_grad()
    def refresh(self, values_NC: torch.Tensor) -> None:
        """New values, same patterns."""
        self.rebind(values_NC)
        if self.forward_operand is not None or self.backward_operand is not None:
            products.refresh_(
                values_NC,
                self.row_bits,
                self.column_bits,
                self.forward_operand,
                self.backward_operand,
                self.tiles["forward"],
                self.tiles["dgrad"],
            )
        if "forward" in self.joined:
            self.joined["forward"].set_values(values_NC)
        if "dgrad" in self.joined:
            scratch = self.row_bits.new_empty(layout.operand_bytes(self.columns, self.rows))
            products.refresh_(values_NC, self.row_bits, self.column_bits, None, scratch, 1, 1)
            self.joined["dgrad"].set_values(layout.values_of(scratch, self.columns, self.rows, 1, self.dtype)[0])
        if self.dense_forward_NK is not None:
            self.dense_forward_NK.copy_(products.unpack_kept(values_NC, self.row_bits))
        if self.dense_backward_NK is not None:
            survivors = values_NC * unpack_bits(self.column_bits)
            self.dense_backward_NK.copy_(products.unpack_kept(survivors, self.row_bits))

    def rebind(self, values_NC: torch.Tensor) -> None:
        """The parameter is here now: for a forward product that reads it."""
        if "forward" in self.handed_over:
            self.handed_over["forward"].values_RC = values_NC

    @torch.no_grad()
    def set_column_pattern(self, column_NC: torch.Tensor, values_NC: torch.Tensor) -> None:
        """A new second pruning: bool `[N, C]` or its bitmask, which is kept and not copied."""
        self.column_bits = (pack_bits(column_NC) if column_NC.dtype == torch.bool else column_NC).contiguous()
        self._write_column_metadata(values_NC)
        self.refresh(values_NC)

    def keep_forward_alone(self) -> None:
        """Let go of all that the forward product does not read: no refresh, dgrad or wgrad can follow."""
        self.row_bits = self.column_bits = self.backward_operand = None

    # -- choices ------------------------------------------------------------------------------------------------------

    def _choice(self, kind: str, tokens: int) -> Choice:
        shape = (self.rows, self.columns) if kind == "forward" else (self.columns, self.rows)
        key = Key(kind, *shape, tokens, self.dtype)
        choice = choices.find(key)
        if choice is not None and not choice.sparse and self.row_bits is None:
            # Chosen for a weight that could keep a dense copy; this one cannot.
            return Choice(True, self.tiles[kind])
        if choice is not None and self._has_form_of(choice, kind):
            return choice
        # Measuring is not for torch.compile to trace. The decorator form would import the compiler with this module.
        adopt = torch.compiler.disable(self._adopt) if "torch._dynamo" in sys.modules else self._adopt
        return adopt(kind, key)

    def _has_form_of(self, choice: Choice, kind: str) -> bool:
        if not choice.sparse:
            return self._dense(kind) is not None
        if choice.by_cutlass and not self.libraries:
            return kind in self.handed_over
        return choice.tiles == self.tiles[kind]

    @torch.no_grad()
    def _adopt(self, kind: str, key: Key) -> Choice:
        """Make the choice if need be, and bring this weight's buffers into the form it wants."""
        if self.device.type == "cpu" and choices.find(key) is None:
            choices.record(key, Choice(True))
        choices.refuse_while_capturing(key, self.device)
        dense_allowed, libraries = self.dense_allowed, self.libraries
        choice = choices.decide(
            key, lambda: measure.measure(key, self.device, dense_allowed=dense_allowed, libraries=libraries)
        )
        if not choice.sparse:
            self._make_dense(kind)
        elif choice.by_cutlass and not self.libraries:
            hand_over(self, kind)
        elif choice.tiles != self.tiles[kind]:
            name = "forward_operand" if kind == "forward" else "backward_operand"
            cut = layout.retile(getattr(self, name), key.rows, key.columns, self.tiles[kind], choice.tiles)
            setattr(self, name, cut)
            self.tiles[kind] = choice.tiles
        return choice

    def _dense(self, kind: str) -> torch.Tensor | None:
        return self.dense_forward_NK if kind == "forward" else self.dense_backward_NK

    def _make_dense(self, kind: str) -> None:
        """Dense copies from the operand's own values: the caller's may have changed since the last refresh."""
        if self._dense(kind) is not None:
            return
        if "forward" in self.joined:
            values_NC = self.joined["forward"].weight_values().contiguous()
        elif "forward" in self.handed_over:
            values_NC = self.handed_over["forward"].values_RC
        elif self.passing_NC is not None:
            values_NC = self.passing_NC
        else:
            operand = held(self.forward_operand, "forward")
            values = layout.values_of(operand, self.rows, self.columns, self.tiles["forward"], self.dtype)
            values_NC = values.reshape(self.rows, -1)
        if kind == "forward":
            self.dense_forward_NK = products.unpack_kept(values_NC, self.row_bits)
        else:
            survivors = values_NC * unpack_bits(self.column_bits)
            self.dense_backward_NK = products.unpack_kept(survivors, self.row_bits)

    # -- products -----------------------------------------------------------------------------------------------------

    def forward(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Y = X (W^R)^T (+ bias), `[T, N]`."""
        if "forward" in self.joined:
            return self.joined["forward"].plain(x_TK, bias_N)
        if not self._choice("forward", x_TK.shape[0]).sparse:
            return torch.nn.functional.linear(x_TK, held(self.dense_forward_NK, "forward"), bias_N)
        if "forward" in self.handed_over:
            return self.handed_over["forward"].product(x_TK, bias_N)
        operand = held(self.forward_operand, "forward")
        return products.sparse_mm(operand, x_TK, self.rows, self.tiles["forward"], bias_N, False)

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dX = dY W^{R,C}, `[T, K]`."""
        if "dgrad" in self.joined:
            return self.joined["dgrad"].plain(dy_TN)
        if not self._choice("dgrad", dy_TN.shape[0]).sparse:
            return dy_TN @ held(self.dense_backward_NK, "dgrad")
        if "dgrad" in self.handed_over:
            return self.handed_over["dgrad"].product(dy_TN)
        operand = held(self.backward_operand, "dgrad")
        return products.sparse_mm(operand, dy_TN, self.columns, self.tiles["dgrad"], None, False)

    def forward_add(self, x_TK: torch.Tensor, y_TN: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Y + X (W^R)^T (+ bias), in the place of Y."""
        if not self._choice("forward", x_TK.shape[0]).sparse:
            y_TN.addmm_(x_TK, held(self.dense_forward_NK, "forward").t())
            return y_TN if bias_N is None else y_TN.add_(bias_N)
        if "forward" in self.handed_over:
            return self.handed_over["forward"].add(x_TK, y_TN, bias_N)
        products.sparse_mm_add_(y_TN, held(self.forward_operand, "forward"), x_TK, self.tiles["forward"], bias_N)
        return y_TN

    def dgrad_add(self, dy_TN: torch.Tensor, dx_TK: torch.Tensor) -> torch.Tensor:
        """dX + dY W^{R,C}, in the place of dX."""
        if not self._choice("dgrad", dy_TN.shape[0]).sparse:
            return dx_TK.addmm_(dy_TN, held(self.dense_backward_NK, "dgrad"))
        if "dgrad" in self.handed_over:
            return self.handed_over["dgrad"].add(dy_TN, dx_TK)
        products.sparse_mm_add_(dx_TK, held(self.backward_operand, "dgrad"), dy_TN, self.tiles["dgrad"], None)
        return dx_TK

    def joined_product(self, kind: str, x_TS, down_PS, up_RP, scale: float, bias_N=None):
        """Y (+ bias) and H = scale X D^T."""
        return self.joined[kind].product(x_TS, down_PS, up_RP, scale, bias_N)

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, draws: TokenDraws | None = None) -> torch.Tensor:
        """dW = dY^T X at the kept places, `[N, C]`; with draws P(dY)^T X, or the exact one where that is faster."""
        if draws is None:
            return products.gather_kept(dy_TN.t() @ x_TK, self.row_bits)
        allowed = self.dense_allowed
        libraries = measure.LIBRARIES if allowed else ("cusparselt",)
        return wgrad.packed(dy_TN, x_TK, self.row_bits, draws, dense_allowed=allowed, libraries=libraries)

    def with_bias(self, bias_N: torch.Tensor) -> BiasedOperands:
        """These operands with a bias added by the forward product's epilogue."""
        return BiasedOperands(self, bias_N)
