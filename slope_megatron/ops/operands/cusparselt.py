"""cuSPARSELt: its operand, whole or cut into row tiles, and its candidates in a measurement.

An operand is one buffer: a copy of the values, then metadata that depends on the patterns alone, so a refresh moves
values only.
"""

from collections.abc import Hashable

import torch

from slope_kernels import cusparselt, cusparselt_library
from slope_kernels.cusparselt import Algorithm
from slope_megatron.ops import update
from slope_megatron.ops.autotune import measure_cusparselt
from slope_megatron.ops.autotune.trials import Candidate, Trial
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import layout, mvue, products
from slope_megatron.ops.operands import patterns as two_of_four
from slope_megatron.ops.operands.protocol import SparseOperand, WeightPatterns
from slope_megatron.sparsity.mvue_rng import MvueRng

NAME = Algorithm.library
DESCRIPTION = "2:4 tensor cores, or dense where that measures faster"


def version() -> str:
    """Of the library; "none" where it is not there."""
    return "none" if cusparselt_library.unsupported() else ".".join(map(str, cusparselt_library.version()))


def unsupported() -> str | None:
    """Why this machine cannot run it; None: it can."""
    return cusparselt_library.unsupported() or two_of_four.without_triton()


def unsupported_weight(values_NC: torch.Tensor, row_bits: torch.Tensor) -> str | None:
    """Why this weight cannot have operands here; None: it can."""
    reason = two_of_four.no_operand(values_NC, row_bits, cusparselt.unsupported_shape)
    if reason:
        return reason
    refused = layout.probe(values_NC.device, values_NC.dtype).refused
    return f"cuSPARSELt {refused}" if refused else None


def unsupported_wgrad(key: Key, device: torch.device) -> str | None:
    """Why it cannot compute a wgrad of `full` mode here; None: it can."""
    if layout.probe(device, key.dtype).known_metadata:
        return None
    return f"cuSPARSELt's operand is written in sm_90's layout and {device} has another"


class CusparseltOperand(SparseOperand):
    """One buffer in the library's own layout; see `SparseOperand`."""

    library = NAME

    def __init__(self, patterns: WeightPatterns, product: Product):
        """Values are not set yet."""
        self.patterns, self.of = patterns, product
        self.rows, self.columns = patterns.shape(product)
        self.tiles = 1
        size = layout.operand_bytes(self.rows, self.columns)
        self.buffer = torch.empty(size, dtype=torch.uint8, device=patterns.device)
        self.set_metadata()

    def product(self, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        return products.sparse_mm(self.buffer, x_TS, self.rows, self.tiles, bias_R)

    def add(self, x_TS: torch.Tensor, y_TR: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        products.sparse_mm_add_(y_TR, self.buffer, x_TS, self.tiles, bias_R)
        return y_TR

    def values(self) -> torch.Tensor:
        """The slots, `[tiles, R/tiles, S/2]`."""
        return layout.values_of(self.buffer, self.rows, self.columns, self.tiles, self.patterns.dtype)

    def metadata(self) -> torch.Tensor:
        """uint8 `[tiles, R S / (8 tiles)]`."""
        return layout.metadata_of(self.buffer, self.rows, self.columns, self.tiles)

    def packed_values(self) -> torch.Tensor:
        return self.values().reshape(self.rows, -1)

    def set_values(self, values_NC: torch.Tensor) -> None:
        if self.of is Product.FORWARD:
            target = self.values()
            target.copy_(values_NC.view_as(target))
        else:
            products.refresh_(values_NC, *self.patterns.both(), None, self.buffer, 1, self.tiles)

    def set_metadata(self) -> None:
        target = self.metadata()
        target.copy_(self.patterns.metadata(self.of).view_as(target))

    def refresh_buffer(self) -> tuple[torch.Tensor, int]:
        return self.buffer, self.tiles

    def fits(self, choice: Choice) -> bool:
        return choice.tiles == self.tiles

    def adopt(self, choice: Choice) -> None:
        """Cut into the choice's tiles."""
        self.buffer = layout.retile(self.buffer, self.rows, self.columns, self.tiles, choice.tiles)
        self.tiles = choice.tiles


Operand = CusparseltOperand


def wgrad(dy_TN: torch.Tensor, x_TK: torch.Tensor, row_bits: torch.Tensor, rng: MvueRng, total: torch.Tensor | None):
    """A dense P(dY)^T X, rounded to 16 bits, of which the kept half `[N, C]` is gathered."""
    return update.kept(dense_wgrad(dy_TN, x_TK, rng), row_bits, total)


def dense_wgrad(dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng) -> torch.Tensor:
    """P(dY)^T X, `[N, K]`."""
    return mvue.sparse_wgrad(mvue.mvue_operand(dy_TN, rng.key, rng.streams, False), x_TK, dy_TN.shape[1])


def finalists(trial: Trial, known: Choice | None = None) -> list[Candidate]:
    """The library's fastest algorithms that pass the gate, of every number of tiles; or that of a known choice."""
    return [*(measure_cusparselt.confirmed(trial, known) if known else measure_cusparselt.finalists(trial))]


def problem(key: Key, tiles: int) -> Hashable:
    """Rows and columns of one tile, padded tokens, dtype, and whether the sparse matrix multiplies from the left."""
    if key.product is Product.WGRAD:
        return (key.rows, cusparselt.padded_columns(key.tokens), key.columns, key.dtype, True)
    return (key.rows // tiles, key.columns, cusparselt.padded_tokens(key.tokens), key.dtype, False)
