"""A sparse operand with low-rank adapters in it: one sparse product does the work of two.

T tokens, S in, R out, P rank, Q the rank filled up to a multiple of 32.   Y [T, R] = X W^T + H U^T,  H = scale X D^T

A dense matrix is the sum of two 2:4 ones: of each group of four the first two places, and the last two. So a factor
fits into a sparse operand exactly, at the price of a sparse product of twice its size, which takes as long as a dense
one of its own:

    row-augmented      rows of W' are W, Da, Db with Da + Db = D:   X W'^T = [X W^T | Ha | Hb],  H = scale (Ha + Hb),
                       then Y = X W^T + H U^T. X is read once; X W^T is read again and Y written beside it (2 R numbers
                       a token)
    column-augmented   W' = [W | Ua | Ub] with Ua + Ub = U, X' = [X | H | H]:   Y = X' W'^T in one go. Y is written
                       once; the kernel that computes H copies X into X' (2 S numbers a token)

An augmented operand stands in the place of the plain one. Its factors are written anew for every product: they are a
few percent of it, and a step of the optimizer may have changed them.
"""

import dataclasses
import functools

import torch

from slope_megatron.ops import choices
from slope_megatron.ops.autotune import measure, measure_cusparselt, timing
from slope_megatron.ops.autotune.resolve import resolve, uncompiled
from slope_megatron.ops.choices import Choice, Key, Product, Strategy
from slope_megatron.ops.custom_ops import adapters, layout, products
from slope_megatron.ops.operands.cusparselt import CusparseltOperand
from slope_megatron.ops.operands.protocol import SparseOperand
from slope_megatron.sparsity.operand import metadata_sm90

# Rows of an operand come by 64, and so do its columns; the two halves of a factor fill them up together.
UNIT = 32
# A block of metadata: 64 rows x 8 groups, half a byte each.
BLOCK_BYTES = 256


def strategy_for(rows: int, columns: int) -> Strategy:
    """The strategy that moves less: see the module's docstring."""
    return Strategy.COLUMN_AUGMENTED if columns <= rows else Strategy.ROW_AUGMENTED


class AugmentedOperand(SparseOperand):
    """Buffer of one operand with room for adapters; see `SparseOperand`."""

    library = CusparseltOperand.library

    def __init__(self, plain: CusparseltOperand, strategy: Strategy, rank: int):
        """Values and metadata of W are those of `plain`, in whose place it will stand."""
        self.patterns, self.of, self.strategy, self.rank = plain.patterns, plain.of, strategy, rank
        self.rows, self.columns, self.dtype = plain.rows, plain.columns, plain.patterns.dtype
        self.by_rows = strategy is Strategy.ROW_AUGMENTED
        self.padded = rank + -rank % UNIT
        extra_rows, extra_columns = (2 * self.padded, 0) if self.by_rows else (0, 2 * self.padded)
        self.outer_rows, self.outer_columns = self.rows + extra_rows, self.columns + extra_columns
        size = layout.operand_bytes(self.outer_rows, self.outer_columns)
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=plain.buffer.device)
        self._write_factor_metadata(extra_rows or self.rows, extra_columns or self.columns)
        self._weight_values().copy_(plain.packed_values())
        self._write_weight_metadata(plain.metadata())

    # -- contents -----------------------------------------------------------------------------------------------------

    def _values(self) -> torch.Tensor:
        """All slots, `[outer rows, outer columns / 2]`."""
        return layout.values_of(self.buffer, self.outer_rows, self.outer_columns, 1, self.dtype)[0]

    def _metadata_blocks(self) -> torch.Tensor:
        """`[outer rows / 64, outer columns / 32, 256]`."""
        metadata = layout.metadata_of(self.buffer, self.outer_rows, self.outer_columns, 1)[0]
        return metadata.view(self.outer_rows // 64, self.outer_columns // 32, BLOCK_BYTES)

    def _write_factor_metadata(self, rows: int, columns: int) -> None:
        """Places 0 and 1 of every group in the factor's first half, 2 and 3 in its second. They never change."""
        places = torch.tensor([0, 1], device=self.buffer.device).expand(rows, columns // 4, 2).clone()
        second = places[rows // 2 :] if self.by_rows else places[:, columns // 8 :]
        second += 2
        blocks = metadata_sm90(places).view(rows // 64, columns // 32, BLOCK_BYTES)
        if self.by_rows:
            self._metadata_blocks()[self.rows // 64 :] = blocks
        else:
            self._metadata_blocks()[:, self.columns // 32 :] = blocks

    def packed_values(self) -> torch.Tensor:
        return self._weight_values().contiguous()

    def _weight_values(self) -> torch.Tensor:
        """W's slots, `[R, S/2]`."""
        return self._values()[: self.rows, : self.columns // 2]

    def set_values(self, values_NC: torch.Tensor) -> None:
        if self.of is Product.DGRAD:
            slots = values_NC.new_empty(self.rows, self.columns // 2)
            products.refresh_(values_NC, *self.patterns.both(), None, slots.view(-1).view(torch.uint8), 1, 1)
            values_NC = slots
        self._weight_values().copy_(values_NC)

    def set_metadata(self) -> None:
        self._write_weight_metadata(self.patterns.metadata(self.of))

    def _write_weight_metadata(self, metadata: torch.Tensor) -> None:
        blocks = metadata.reshape(self.rows // 64, self.columns // 32, BLOCK_BYTES)
        self._metadata_blocks()[: self.rows // 64, : self.columns // 32] = blocks

    def _set_factor(self, down_PS: torch.Tensor, up_RP: torch.Tensor) -> None:
        if self.by_rows:
            halves = self._values()[self.rows :].view(2, self.padded, self.columns // 4, 2)
            halves[:, : self.rank].copy_(down_PS.unflatten(1, (-1, 2, 2)).permute(2, 0, 1, 3))
        else:
            halves = self._values()[:, self.columns // 2 :].unflatten(1, (2, self.padded // 4, 2))
            halves[:, :, : self.rank // 4].copy_(up_RP.unflatten(1, (-1, 2, 2)).transpose(1, 2))

    # -- products -----------------------------------------------------------------------------------------------------

    def with_adapters(self, x_TS, down_PS, up_RP, scale: float, bias_R=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Y `[T, R]` (+ bias) and H `[T, P]`."""
        self._ensure_algorithm(x_TS.shape[0])
        self._set_factor(down_PS, up_RP)
        if not self.by_rows:
            hidden_TP, joined = adapters.join_input(x_TS, down_PS, self.padded, scale)
            return products.sparse_mm(self.buffer, joined, self.rows, 1, bias_R), hidden_TP
        whole = self._whole(x_TS, bias_R)
        first, second = whole[:, self.rows :].split(self.padded, 1)
        hidden_TP = (first[:, : self.rank] + second[:, : self.rank]) * scale
        return adapters.add_low_rank(whole[:, : self.rows], hidden_TP, up_RP), hidden_TP

    def product(self, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """Without the adapters: rare once they have joined, and not fast."""
        self._ensure_algorithm(x_TS.shape[0])
        if not self.by_rows:
            joined = torch.nn.functional.pad(x_TS, (0, 2 * self.padded))
            return products.sparse_mm(self.buffer, joined, self.rows, 1, bias_R)
        return self._whole(x_TS, bias_R)[:, : self.rows].contiguous()

    def _whole(self, x_TS: torch.Tensor, bias_R: torch.Tensor | None) -> torch.Tensor:
        """X W'^T of a row-augmented operand."""
        long_bias = None if bias_R is None else torch.nn.functional.pad(bias_R, (0, 2 * self.padded))
        return products.sparse_mm(self.buffer, x_TS, self.outer_rows, 1, long_bias)

    def add(self, x_TS: torch.Tensor, y_TR: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        return y_TR.add_(self.product(x_TS, bias_R))

    def _ensure_algorithm(self, tokens: int) -> None:
        """The library's algorithm for the outer shape is measured like every other."""
        key = Key(Product(self.strategy.value), self.outer_rows, self.outer_columns, tokens, self.dtype)
        if choices.find(key) is None:
            device = self.patterns.device
            measured = functools.partial(measure_algorithm, key, device)
            uncompiled(resolve)(key, device, measured, on_cpu=Choice(True))


@torch.no_grad()
def measure_algorithm(key: Key, device: torch.device) -> Choice:
    """The fastest of the library's algorithms that multiplies right, on a whole operand."""
    trial = measure.prepare(dataclasses.replace(key, product=Product.FORWARD), device)
    candidates = {candidate.algorithm: candidate for candidate in measure_cusparselt.finalists(trial, [1])}
    if not candidates:
        return Choice(True)
    samples = timing.interleaved(candidates, rounds=7, calls=3)
    times = {algorithm: timing.median(values) for algorithm, values in samples.items()}
    best = min(times, key=times.__getitem__)
    torch.cuda.empty_cache()
    return Choice(True, 1, best, times[best])
