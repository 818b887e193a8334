"""A sparse operand with low-rank adapters in it, column-augmented: one sparse product does the work of two.

T tokens, S in, R out, P rank, Q the rank padded to a multiple of 32.

    Y [T, R] = X W^T + H U^T = X' W'^T      H = scale X D^T,  X' = [X | H | H],  W' = [W | Ua | Ub],  Ua + Ub = U

A dense matrix is the sum of two 2:4 ones: of each group of four the first two elements, and the last two. So the factor
U fits into a sparse operand exactly, at the price of a sparse product of twice its size, which takes as long as a dense
one of its own. Y is written once; the kernel that computes H copies X into X' (2 S numbers a token).

An augmented operand replaces the plain one. U is written anew for every product: it is a few percent of the operand,
and a step of the optimizer may have changed it.
"""

import functools

import torch

from slope_megatron.ops.autotune import measure, measure_cusparselt, timing
from slope_megatron.ops.autotune.resolve import resolve
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import adapters, layout, products
from slope_megatron.ops.operands.cusparselt import CusparseltOperand
from slope_megatron.ops.operands.protocol import SparseOperand
from slope_megatron.sparsity.operand import metadata_sm90

# An operand's columns come by 64; the two halves of the factor fill them up together.
UNIT = 32
# A block of metadata: 64 rows x 8 groups, half a byte each.
BLOCK_BYTES = 256


class AugmentedOperand(SparseOperand):
    """Buffer of one operand with room for adapters; see `SparseOperand`."""

    library = CusparseltOperand.library

    def __init__(self, plain: CusparseltOperand, rank: int):
        """Values and metadata of W are those of `plain`, which it will replace."""
        self.patterns, self.of, self.rank = plain.patterns, plain.of, rank
        self.rows, self.columns, self.dtype = plain.rows, plain.columns, plain.patterns.dtype
        self.padded = rank + -rank % UNIT
        self.outer_columns = self.columns + 2 * self.padded
        size = layout.operand_bytes(self.rows, self.outer_columns)
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=plain.buffer.device)
        self._write_factor_metadata()
        self._weight_values().copy_(plain.packed_values())
        self._write_weight_metadata(plain.metadata())

    # -- contents -----------------------------------------------------------------------------------------------------

    def _values(self) -> torch.Tensor:
        """All slots, `[R, outer columns / 2]`."""
        return layout.values_of(self.buffer, self.rows, self.outer_columns, 1, self.dtype)[0]

    def _weight_values(self) -> torch.Tensor:
        """W's slots, `[R, S/2]`."""
        return self._values()[:, : self.columns // 2]

    def _metadata_blocks(self) -> torch.Tensor:
        """`[R / 64, outer columns / 32, 256]`."""
        metadata = layout.metadata_of(self.buffer, self.rows, self.outer_columns, 1)[0]
        return metadata.view(self.rows // 64, self.outer_columns // 32, BLOCK_BYTES)

    def _write_factor_metadata(self) -> None:
        """Elements 0 and 1 of every group in the factor's first half, 2 and 3 in its second. They never change."""
        groups = self.padded // 2
        indices = torch.tensor([0, 1], device=self.buffer.device).expand(self.rows, groups, 2).clone()
        indices[:, groups // 2 :] += 2
        blocks = metadata_sm90(indices).view(self.rows // 64, 2 * self.padded // 32, BLOCK_BYTES)
        self._metadata_blocks()[:, self.columns // 32 :] = blocks

    def _write_weight_metadata(self, metadata: torch.Tensor) -> None:
        blocks = metadata.reshape(self.rows // 64, self.columns // 32, BLOCK_BYTES)
        self._metadata_blocks()[:, : self.columns // 32] = blocks

    def packed_values(self) -> torch.Tensor:
        return self._weight_values().contiguous()

    def set_values(self, values_NC: torch.Tensor) -> None:
        if self.of is Product.DGRAD:
            slots = values_NC.new_empty(self.rows, self.columns // 2)
            products.refresh_(values_NC, *self.patterns.both(), None, slots.view(-1).view(torch.uint8), 1, 1)
            values_NC = slots
        self._weight_values().copy_(values_NC)

    def set_metadata(self) -> None:
        self._write_weight_metadata(self.patterns.metadata(self.of))

    def set_factor(self, up_RP: torch.Tensor) -> None:
        """U into both halves of its columns; past the rank they stay zero."""
        halves = self._values()[:, self.columns // 2 :].unflatten(1, (2, self.padded // 4, 2))
        halves[:, :, : self.rank // 4].copy_(up_RP.unflatten(1, (-1, 2, 2)).transpose(1, 2))

    # -- products -----------------------------------------------------------------------------------------------------

    def with_adapters(self, x_TS, down_PS, up_RP, scale: float, bias_R=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Y `[T, R]` (+ bias) and H `[T, P]`."""
        self._ensure_algorithm(x_TS.shape[0])
        self.set_factor(up_RP)
        hidden_TP, joined = adapters.join_input(x_TS, down_PS, self.padded, scale)
        return products.sparse_mm(self.buffer, joined, self.rows, 1, bias_R), hidden_TP

    def product(self, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """Without the adapters: rare once they have joined, and not fast."""
        self._ensure_algorithm(x_TS.shape[0])
        joined = torch.nn.functional.pad(x_TS, (0, 2 * self.padded))
        return products.sparse_mm(self.buffer, joined, self.rows, 1, bias_R)

    def add(self, x_TS: torch.Tensor, y_TR: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        return y_TR.add_(self.product(x_TS, bias_R))

    def _ensure_algorithm(self, tokens: int) -> None:
        """The library's algorithm for the outer shape is measured like every other."""
        key = Key(Product.FORWARD, self.rows, self.outer_columns, tokens, self.dtype, augmented=True)
        device = self.patterns.device
        resolve(key, device, functools.partial(measure_algorithm, key, device), on_cpu=Choice(True))


@torch.no_grad()
def measure_algorithm(key: Key, device: torch.device) -> Choice:
    """The fastest of the library's algorithms that multiplies right, on a whole operand."""
    candidates = measure_cusparselt.finalists(measure.prepare(key, device), [1])
    if not candidates:
        return Choice(True)
    samples = timing.interleaved({each.algorithm: each for each in candidates}, rounds=7, calls=3)
    times = {algorithm: timing.median(values) for algorithm, values in samples.items()}
    best = min(times, key=times.__getitem__)
    torch.cuda.empty_cache()
    return Choice(True, 1, best, times[best])
