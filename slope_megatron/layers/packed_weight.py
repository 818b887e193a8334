"""PackedWeight: what all layers with packed values share, Megatron's and torch's own.

N out, K in (this rank's shard), C = K n/m kept per row.

    weight          Parameter [N, C]           packed values
    weight_pattern  buffer uint8 [N, K/8]      row pattern, static
    weight_column   buffer uint8 [N, C/8]      which values survive the second pruning; state, it cannot be rebuilt

Operands, what a kernel wants, are derived from these on first use, follow them and are never saved (`pruned_linear`).
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.kept_operands import KeptOperands, lent
from slope_megatron.layers.pruned_linear import PrunedLinear, check_shard
from slope_megatron.ops.backend import PRODUCTS, MvueRng, Operands, Product, build_operands, choose_column_bits
from slope_megatron.sparsity import counter
from slope_megatron.sparsity.packing import pack, pack_bits, unpack, unpack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern, random_pattern
from slope_megatron.sparsity.pieces import pieces


@dataclasses.dataclass(frozen=True)
class Region:
    """Where some local rows of a shard lie in the whole matrix, and under which canonical name."""

    name: str
    local_rows: range
    first_row: int
    first_column: int
    row_length: int

    def rows(self, chunk: range) -> range:
        """The rows of the whole matrix for a chunk of local rows."""
        shift = self.first_row - self.local_rows.start
        return range(chunk.start + shift, chunk.stop + shift)


@dataclasses.dataclass(frozen=True)
class DoublePruning:
    """Counts of this rank's shard: what the second pruning drops of the kept weights, in number and in energy."""

    weights: int
    dropped: int
    energy: float
    energy_dropped: float


def input_unit(slope: SlopeConfig) -> int:
    """What the inputs must be a multiple of: then the kept ones are whole bytes of a bitmask."""
    return 8 * slope.m // math.gcd(8 * slope.m, slope.n)


class EphemeralOperands:
    """Operands of a weight whose values are here only while its layer computes, as under ZeRO-3.

    They are built from the values for each use and dropped after it: in forward, and once in backward for both
    products. The memory is scratch: the next layer's operands take it. The weight must be gathered whenever a product
    is asked for, which ZeRO-3's hooks around a layer's forward and backward see to.

    Args:
        build: (weight, names of products) -> operands of its present values.
        weight: what is multiplied; the parameter itself, whose memory comes and goes.
    """

    def __init__(self, build: Callable[[torch.Tensor, tuple[Product, ...]], Operands], weight: torch.Tensor):
        self.build, self.weight = build, weight
        self.of_backward: Operands | None = None

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.build(self.weight, (Product.FORWARD,)).forward(x_TK)

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        self.of_backward = self.build(self.weight, (Product.DGRAD, Product.WGRAD))
        return self.of_backward.dgrad(dy_TN)

    def wgrad(
        self,
        dy_TN: torch.Tensor,
        x_TK: torch.Tensor,
        rng: MvueRng | None = None,
        total: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        operands = self.of_backward or self.build(self.weight, (Product.WGRAD,))
        self.of_backward = None
        return operands.wgrad(dy_TN, x_TK, rng, total)


class PackedWeight(PrunedLinear):
    """Mixed into a linear whose constructor leaves `weight` as `[N, C]`: no dense weight need ever exist."""

    weight_pattern: torch.Tensor
    weight_column: torch.Tensor
    PATTERNS = ("weight_pattern", "weight_column")
    _kept: KeptOperands[Operands] | None
    # Whether the second pruning is to be chosen anew as soon as the values are whole; see `values_arrive_later`.
    _column_pattern_due = False

    def init_packed(self, slope: SlopeConfig) -> None:
        """Buffers and adapters; called once, at the end of the constructor.

        Raises:
            ValueError: the shard cuts a group or a byte of a bitmask.
        """
        rows, kept = self.weight.shape
        columns = kept * slope.m // slope.n
        check_shard(rows, columns, slope, input_unit(slope), "packed")
        device = self.weight.device
        self.register_buffer("weight_pattern", torch.zeros(rows, columns // 8, dtype=torch.uint8, device=device))
        self.register_buffer("weight_column", torch.zeros(rows, kept // 8, dtype=torch.uint8, device=device))
        self.init_adapters(slope, columns)
        self.keep_operands = True

    # -- the build ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weight(self, seed: int, region: Region, std: float) -> None:
        """Row pattern and values of one region, from the counter generator at canonical indices.

        The values are those that the dense weight would have there (times `SlopeConfig.initial_scale`).
        """
        key = counter.key_of(seed, region.name)
        pattern_key = counter.key_of(seed, f"{region.name}_pattern")
        n, m, device = self.slope.n, self.slope.m, self.weight.device
        columns = range(region.first_column, region.first_column + self.weight_pattern.shape[1] * 8)
        scale = std * self.slope.initial_scale
        for local in pieces(region.local_rows, len(columns), device):
            rows = region.rows(local)
            dense = counter.normal(key, rows, columns, region.row_length, device)
            if self.slope.pattern == "random":
                words = counter.bits(pattern_key, rows, columns, region.row_length, device)
                mask = random_pattern(words, n, m)
            else:
                mask = magnitude_pattern(dense, n, m)
            self.weight[local.start : local.stop] = pack(dense * scale, mask).to(self.weight.dtype)
            self.weight_pattern[local.start : local.stop] = pack_bits(mask)
        self.mark_present("weight", "weight_pattern")
        self.drop_operands()

    # -- state and operands -------------------------------------------------------------------------------------------

    def row_pattern(self) -> torch.Tensor:
        """W^R's kept positions: bool `[N, K]`."""
        return unpack_bits(self.weight_pattern)

    def surviving(self) -> torch.Tensor:
        """Which kept values W^{R,C} has: bool `[N, C]`."""
        return unpack_bits(self.weight_column)

    def dense_weight(self) -> torch.Tensor:
        """W^R `[N, K]`, zeros included."""
        return unpack(self.weight.detach(), self.row_pattern())

    @torch.no_grad()
    def update_column_pattern(self) -> None:
        """Choose the second pruning anew, by magnitude of the present values, and rewrite the backward operand."""
        values = lent(self.weight)
        self.weight_column.copy_(choose_column_bits(values, self.weight_pattern, self.slope.n, self.slope.m))
        self.mark_present("weight_column")
        kept = self._kept
        if kept is None or not kept.reads(self.weight, self.pattern_buffers()):
            self.drop_operands()
            return
        kept.operands.set_column_pattern(self.weight_column, values)
        kept.mark_fresh(self.weight)
        kept.mark_last_pattern(self.weight_column)

    def values_arrive_later(self, choose: bool) -> None:
        """After a step whose values are gathered over data-parallel ranks only before the next forward.

        That forward refreshes the operands then, as does whoever asks for them or for the layer's state.

        Args:
            choose: whether the second pruning is to be chosen anew.
        """
        self._column_pattern_due |= choose
        if self._kept is not None:
            self._kept.may_be_stale = True

    def choose_if_due(self) -> None:
        """The second pruning that `values_arrive_later` left to do; the values are whole by now."""
        if self._column_pattern_due:
            self._column_pattern_due = False
            self.update_column_pattern()

    def present_operands(self, weight: torch.Tensor) -> KeptOperands[Operands]:
        self.choose_if_due()
        return super().present_operands(weight)

    def _save_to_state_dict(self, *arguments, **keywords) -> None:
        self.choose_if_due()
        super()._save_to_state_dict(*arguments, **keywords)

    def _load_from_state_dict(self, *arguments, **keywords) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._column_pattern_due = False

    def build_operands(self, weight: torch.Tensor) -> Operands:
        return self.new_operands(weight, PRODUCTS)

    def new_operands(self, weight: torch.Tensor, products: tuple[Product, ...]) -> Operands:
        """Operands of the present values of `weight` that serve `products`.

        Raises:
            RuntimeError: weight or patterns were never initialized nor loaded.
        """
        self.check_initialized()
        return build_operands(
            self.slope.backend,
            lent(weight),
            self.weight_pattern,
            self.weight_column,
            products,
            float8_kinds=self.slope.float8_kinds,
        )

    def double_pruning(self) -> DoublePruning:
        """What the second pruning costs here, measured."""
        values = self.weight.detach().double()
        dropped = ~self.surviving()
        return DoublePruning(
            weights=self.weight_pattern.numel() * 8,
            dropped=int(dropped.sum()),
            energy=float(values.square().sum()),
            energy_dropped=float(values[dropped].square().sum()),
        )

    def product_operands(self, weight: torch.Tensor):
        """The kept operands; or, where the values are here only while the layer computes, some built for each use."""
        if self.keep_operands:
            return super().product_operands(weight)
        self.choose_if_due()
        return EphemeralOperands(self.new_operands, weight), None

    def gradient_rng(self) -> MvueRng | None:
        """In `full` mode wgrad reads an unbiased 2:4 estimate of dY."""
        return self.current_rng() if self.slope.mode == "full" else None
