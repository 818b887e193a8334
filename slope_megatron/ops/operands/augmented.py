"""A sparse operand with low-rank adapters in it: one sparse product does the work of two.

T tokens, S in, R out, P rank, Q the rank filled up to a multiple of 32.   Y [T, R] = X W^T + H U^T,  H = scale X D^T

A dense matrix is the sum of two 2:4 ones: of each group of four the first two places, and the last two. So a factor
fits into a sparse operand exactly, at the price of a sparse product of twice its size, which takes as long as a dense
one of its own:

    tall    rows of W' are W, Da, Db with Da + Db = D:   X W'^T = [X W^T | Ha | Hb],  H = scale (Ha + Hb),  then
            Y = X W^T + H U^T. X is read once; X W^T is read again and Y written beside it (2 R numbers a token)
    wide    W' = [W | Ua | Ub] with Ua + Ub = U, X' = [X | H | H]:   Y = X' W'^T in one go. Y is written once; the
            kernel that computes H copies X into X' (2 S numbers a token)

A joined operand stands in the place of the plain one. Its factors are written anew for every product: they are a few
percent of it, and a step of the optimizer may have changed them.
"""

import dataclasses
import sys

import torch

from slope_megatron.ops import choices
from slope_megatron.ops.autotune import measure, timing
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.ops.custom_ops import adapters as adapter_products
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.sparsity.operand import metadata_sm90

# Rows of an operand come by 64, and so do its columns; the two halves of a factor fill them up together.
UNIT = 32
# A block of metadata: 64 rows x 8 groups, half a byte each.
BLOCK_BYTES = 256


def form_for(rows: int, columns: int) -> str:
    """The form that moves less: see the module's docstring."""
    return "wide" if columns <= rows else "tall"


# Attribute of the plain operand of each product.
PLAIN = {"forward": "forward_operand", "dgrad": "backward_operand"}


class JoinedOperand:
    """Buffer of one operand with room for a factor; W `[R, S]` and metadata are set, never rebuilt here."""

    def __init__(self, form: str, rows: int, columns: int, rank: int, dtype: torch.dtype, device: torch.device):
        self.form, self.rows, self.columns, self.rank, self.dtype = form, rows, columns, rank, dtype
        self.padded = rank + -rank % UNIT
        extra_rows, extra_columns = (2 * self.padded, 0) if form == "tall" else (0, 2 * self.padded)
        self.outer_rows, self.outer_columns = rows + extra_rows, columns + extra_columns
        size = layout.operand_bytes(self.outer_rows, self.outer_columns)
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self._write_factor_metadata(extra_rows or rows, extra_columns or columns)

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
        second = places[rows // 2 :] if self.form == "tall" else places[:, columns // 8 :]
        second += 2
        blocks = metadata_sm90(places).view(rows // 64, columns // 32, BLOCK_BYTES)
        if self.form == "tall":
            self._metadata_blocks()[self.rows // 64 :] = blocks
        else:
            self._metadata_blocks()[:, self.columns // 32 :] = blocks

    def weight_values(self) -> torch.Tensor:
        """W's slots, `[R, S/2]`."""
        return self._values()[: self.rows, : self.columns // 2]

    def set_values(self, values: torch.Tensor) -> None:
        self.weight_values().copy_(values)

    def set_metadata(self, metadata: torch.Tensor) -> None:
        """W's metadata, as of an operand of one tile."""
        blocks = metadata.reshape(self.rows // 64, self.columns // 32, BLOCK_BYTES)
        self._metadata_blocks()[: self.rows // 64, : self.columns // 32] = blocks

    def _set_factor(self, down_PS: torch.Tensor, up_RP: torch.Tensor) -> None:
        if self.form == "tall":
            halves = self._values()[self.rows :].view(2, self.padded, self.columns // 4, 2)
            halves[:, : self.rank].copy_(down_PS.unflatten(1, (-1, 2, 2)).permute(2, 0, 1, 3))
        else:
            halves = self._values()[:, self.columns // 2 :].unflatten(1, (2, self.padded // 4, 2))
            halves[:, :, : self.rank // 4].copy_(up_RP.unflatten(1, (-1, 2, 2)).transpose(1, 2))

    # -- products -----------------------------------------------------------------------------------------------------

    def product(self, x_TS, down_PS, up_RP, scale: float, bias_R=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Y `[T, R]` (+ bias) and H `[T, P]`."""
        self._ensure_algorithm(x_TS.shape[0])
        self._set_factor(down_PS, up_RP)
        if self.form == "wide":
            hidden_TP, joined = adapter_products.join_input(x_TS, down_PS, self.padded, scale)
            return products.sparse_mm(self.buffer, joined, self.rows, 1, bias_R, False), hidden_TP
        whole = products.sparse_mm(self.buffer, x_TS, self.outer_rows, 1, self._long_bias(bias_R), False)
        first, second = whole[:, self.rows :].split(self.padded, 1)
        hidden_TP = (first[:, : self.rank] + second[:, : self.rank]) * scale
        return adapter_products.add_low_rank(whole[:, : self.rows], hidden_TP, up_RP), hidden_TP

    def plain(self, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """X W^T (+ bias), without the adapters: rare once they have joined, and not fast."""
        self._ensure_algorithm(x_TS.shape[0])
        if self.form == "wide":
            joined = torch.nn.functional.pad(x_TS, (0, 2 * self.padded))
            return products.sparse_mm(self.buffer, joined, self.rows, 1, bias_R, False)
        whole = products.sparse_mm(self.buffer, x_TS, self.outer_rows, 1, self._long_bias(bias_R), False)
        return whole[:, : self.rows].contiguous()

    def _long_bias(self, bias_R: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias_R is None else torch.nn.functional.pad(bias_R, (0, 2 * self.padded))

    def _ensure_algorithm(self, tokens: int) -> None:
        """The library's algorithm for the outer shape is measured like every other."""
        key = Key(self.form, self.outer_rows, self.outer_columns, tokens, self.dtype)
        if choices.find(key) is None:
            decide = torch.compiler.disable(self._decide) if "torch._dynamo" in sys.modules else self._decide
            decide(key)

    @torch.no_grad()
    def _decide(self, key: Key) -> None:
        if self.buffer.device.type == "cpu":
            choices.record(key, Choice(True))
        choices.refuse_while_capturing(key, self.buffer.device)
        choices.decide(key, lambda: measure_algorithm(key, self.buffer.device))


def can_join(operands, kind: str, tokens: int, rank: int) -> bool:
    """Whether adapters may go into an operand: where it is the library's own, in a layout that we know."""
    if not hasattr(operands, "joined"):
        return False
    shape = (operands.rows, operands.columns) if kind == "forward" else (operands.columns, operands.rows)
    plain = choices.find(Key(kind, *shape, tokens, operands.dtype))
    if plain is not None and (not plain.sparse or plain.by_cutlass):
        return False
    known = layout.probe(operands.device, operands.dtype).known_metadata
    return getattr(operands, PLAIN[kind]) is not None and rank % 4 == 0 and known


def joined_copy(operands, kind: str, form: str, rank: int) -> JoinedOperand:
    """A joined operand with the present values and metadata of the plain one."""
    rows, columns = (operands.rows, operands.columns) if kind == "forward" else (operands.columns, operands.rows)
    plain, tiles = getattr(operands, PLAIN[kind]), operands.tiles[kind]
    joined = JoinedOperand(form, rows, columns, rank, operands.dtype, operands.device)
    joined.set_values(layout.values_of(plain, rows, columns, tiles, operands.dtype).reshape(rows, -1))
    joined.set_metadata(layout.metadata_of(plain, rows, columns, tiles))
    return joined


@torch.no_grad()
def join(operands, kind: str, form: str, rank: int) -> None:
    """Put a joined operand in the place of the plain one."""
    operands.joined[kind] = joined_copy(operands, kind, form, rank)
    setattr(operands, PLAIN[kind], None)


def measure_algorithm(key: Key, device: torch.device) -> Choice:
    """The fastest of the library's algorithms that multiplies right, on a whole operand."""
    trial = measure.prepare(dataclasses.replace(key, kind="forward"), device)
    candidates = {candidate.algorithm: candidate for candidate in measure.cusparselt_finalists(trial, [1])}
    if not candidates:
        return Choice(True)
    samples = timing.interleaved(candidates, rounds=7, calls=3)
    times = {algorithm: timing.median(values) for algorithm, values in samples.items()}
    best = min(times, key=times.__getitem__)
    torch.cuda.empty_cache()
    return Choice(True, 1, best, times[best])
