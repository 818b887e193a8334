"""MaskedWeight: a dense weight that is multiplied as a pruned one. The baselines; they save no memory.

N out, K in (this rank's shard), T tokens.

    weight        Parameter [N, K]        W, dense
    weight_mask   buffer uint8 [N, K/8]   S, a bitmask; in the checkpoint, so that whoever reads it knows what counts

                forward        dgrad            wgrad (dense)       S
    srste       X (S W)^T      P(dY) S W        P(dY)^T X           N:M by magnitude of the present W, along K
    fst         X (S W)^T      dY S W           MVUE(dY)^T X        transposable 2:4, state, searched now and then
    (tail)      X W^T          dY W             dY^T X              all ones: FST's last steps

P keeps the n largest of every m tokens of dY. Every weight gets a gradient (straight through the mask), and before the
optimizer lambda (1 - S) W is added to it (`training.baselines`).
Sources: SR-STE, arXiv 2102.04010; Extended SR-STE, SLoPe's section 4 and appendix; FST, arXiv 2404.01847.
"""

from collections.abc import Callable

import torch

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.ops.backend import TokenDraws
from slope_megatron.sparsity.packing import pack_bits, unpack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern
from slope_megatron.sparsity.tokens import largest_along_tokens
from slope_megatron.sparsity.transposable import transposable_mask


class DenseOperands:
    """A dense matrix for all products."""

    def __init__(self, weight_NK: torch.Tensor):
        self.weight_NK = weight_NK

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return x_TK @ self.weight_NK.t()

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        return dy_TN @ self.weight_NK

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, draws: TokenDraws | None = None) -> torch.Tensor:
        return (draws.estimate(dy_TN) if draws else dy_TN).t() @ x_TK


class MaskedWeight(PrunedLinear):
    """Mixed into Megatron's linears, whose dense `weight` stays as it is."""

    weight_mask: torch.Tensor

    def init_masked(self, slope: SlopeConfig, partition_dim: int, stride: int) -> None:
        """Called once, at the end of the constructor.

        Raises:
            ValueError: the shard cuts a group, a block or a byte of the bitmask.
        """
        rows, columns = self.weight.shape
        check_masked_shard(rows, columns, slope)
        mask = torch.zeros(rows, columns // 8, dtype=torch.uint8, device=self.weight.device)
        self.register_buffer("weight_mask", mask)
        self.init_adapters(slope, columns, partition_dim, stride)
        self.masking = True
        self._operands: DenseOperands | None = None
        self._version = -1
        self.register_load_state_dict_post_hook(lambda module, _: module.drop_operands())

    def mask(self) -> torch.Tensor:
        """S as bool `[N, K]`."""
        return unpack_bits(self.weight_mask)

    @torch.no_grad()
    def update_mask(self) -> None:
        """Choose S for the present weight."""
        weight = self.weight.detach()
        if self.slope.method == "fst":
            mask = transposable_mask(weight)
        else:
            mask = magnitude_pattern(weight, self.slope.n, self.slope.m)
        self.weight_mask.copy_(pack_bits(mask))
        self.drop_operands()

    def set_masking(self, masking: bool) -> None:
        """Whether the weight is pruned from here on; S is all ones where it is not."""
        if not masking:
            self.weight_mask.fill_(255)
        if masking != self.masking:
            self.masking = masking
            self.drop_operands()

    def dense_weight(self) -> torch.Tensor:
        """S W `[N, K]`: what is multiplied; W itself in the dense tail."""
        return self.weight.detach() * self.mask() if self.masking else self.weight.detach()

    def operands(self) -> DenseOperands:
        """S W of the present weight: made on first use, and anew when the parameter was written."""
        if self._operands is None or self._version != self.weight._version:
            self._operands = DenseOperands(self.dense_weight())
            self._version = self.weight._version
        return self._operands

    def drop_operands(self) -> None:
        """Forget S W: the weight was written behind autograd's back, or the mask is another."""
        self._operands = None

    def _apply(self, *arguments, **keywords):
        self.drop_operands()
        return super()._apply(*arguments, **keywords)

    def gradient_pruning(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if not self.masking or self.slope.method == "fst":
            return None
        n, m = self.slope.n, self.slope.m
        return lambda dy_TN: largest_along_tokens(dy_TN, n, m)

    def gradient_draws(self) -> TokenDraws | None:
        return self.present_draws() if self.masking and self.slope.method == "fst" else None


def check_masked_shard(rows: int, columns: int, slope: SlopeConfig) -> None:
    """Refuse a shard that cuts a group, a 4 x 4 block or a byte of the bitmask."""
    if rows % slope.m or columns % slope.m or columns % 8:
        raise ValueError(
            f"a masked {slope.nm} shard of {rows} x {columns} (out x in on this rank) cannot be cut: out must be a "
            f"multiple of {slope.m} and in one of {max(8, slope.m)}; choose other widths or a smaller tensor-parallel "
            "size"
        )
