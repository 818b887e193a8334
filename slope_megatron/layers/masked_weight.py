"""MaskedWeight: a dense weight that is multiplied as a pruned one. The baselines; they save no memory.

N out, K in (this rank's shard), T tokens.

    weight        Parameter [N, K]        W, dense
    weight_mask   buffer uint8 [N, K/8]   S, a bitmask; in the checkpoint, so that whoever reads it knows what counts
    weight_scale  buffer fp32 [1]         S-STE's b, of the first weight and frozen; others have none

                forward        dgrad            wgrad (dense)       S
    srste       X (S W)^T      dY S W           dY^T X              N:M by magnitude of the present W, along K
    extended-   X (S W)^T      P(dY) S W        P(dY)^T X           the same
    srste
    fst         X (S W)^T      dY S W           MVUE(dY)^T X        transposable 2:4, state, searched now and then
    rigl        X (S W)^T      dY S W           dY^T X, S's places  state, places swap now and then
    sste        X (b S(W))^T   dY b S(W)        MVUE(dY)^T X        of S(W), its soft threshold: as srste's

P keeps the n largest of every m tokens of dY. Every weight gets a gradient (straight through the mask), and before the
optimizer lambda (1 - S) W is added to it (`training.baselines`; not in S-STE). What differs is in the rows of
`config.methods`.
Sources: SR-STE, arXiv 2102.04010; Extended SR-STE, SLoPe's section 4 and appendix; FST, arXiv 2404.01847; S-STE, arXiv
2409.09099.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from slope_megatron.config import SlopeConfig
from slope_megatron.config.methods import Baseline
from slope_megatron.layers.masks import largest_along_tokens, magnitude_bits, mask_into
from slope_megatron.layers.pruned_linear import PrunedLinear, check_shard
from slope_megatron.ops.backend import MvueRng
from slope_megatron.ops.operands import wgrad
from slope_megatron.ops.update import handed_on
from slope_megatron.sparsity.packing import pack_bits, unpack_bits
from slope_megatron.sparsity.pieces import rows_at_once
from slope_megatron.sparsity.soft_threshold import scale_of, scale_sums
from slope_megatron.sparsity.transposable import transposable_mask

CHOOSE = {
    "magnitude": magnitude_bits,
    "transposable": lambda weight_NK, n, m: pack_bits(transposable_mask(weight_NK)),
}


class MaskedOperands:
    """S W or b S(W) as a matrix of its own, for all products.

    Args:
        mask_bits: S, a bitmask uint8 `[N, K/8]`; kept and not copied.
        scale: S-STE's b, fp32 `[1]`; kept and not copied. None: S W.
    """

    def __init__(self, weight_NK: torch.Tensor, mask_bits: torch.Tensor, scale: torch.Tensor | None = None):
        self.mask_bits, self.scale = mask_bits, scale
        self.weight_NK = torch.empty_like(weight_NK)
        self.refresh(weight_NK)

    @torch.no_grad()
    def refresh(self, weight_NK: torch.Tensor) -> None:
        """New values, the same mask."""
        mask_into(self.weight_NK, weight_NK, self.mask_bits, self.scale)

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return x_TK @ self.weight_NK.t()

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        return dy_TN @ self.weight_NK

    def wgrad(
        self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None, total: torch.Tensor | None = None
    ):
        return handed_on(wgrad.dense(dy_TN, x_TK, rng) if rng else dy_TN.t() @ x_TK, total)


class MaskedWeight(PrunedLinear):
    """Mixed into Megatron's linears, whose dense `weight` stays as it is."""

    weight_mask: torch.Tensor
    weight_scale: torch.Tensor | None
    tp_group: dist.ProcessGroup
    PATTERNS = ("weight_mask",)

    def init_masked(self, slope: SlopeConfig) -> None:
        """Called once, at the end of the constructor.

        Raises:
            ValueError: the shard cuts a group, a block or a byte of the bitmask.
        """
        assert slope.baseline
        self.baseline: Baseline = slope.baseline
        rows, columns = self.weight.shape
        check_shard(rows, columns, slope, max(8, slope.m), "masked")
        mask = torch.zeros(rows, columns // 8, dtype=torch.uint8, device=self.weight.device)
        self.register_buffer("weight_mask", mask)
        # A scale that nobody has chosen or loaded makes itself known in the first loss.
        scale = torch.full((1,), torch.nan, device=self.weight.device) if self.baseline.soft else None
        self.register_buffer("weight_scale", scale)
        self.init_adapters(slope, columns)

    def mask(self) -> torch.Tensor:
        """S as bool `[N, K]`."""
        return unpack_bits(self.weight_mask)

    @torch.no_grad()
    def choose_scale(self) -> None:
        """S-STE's b for the present weight, for good; collective over the tensor-parallel ranks. Others have none."""
        if self.weight_scale is None:
            return
        weight = self.weight.detach()
        parts = weight.split(rows_at_once(weight.shape[1], weight.device))
        sums = torch.stack([scale_sums(part) for part in parts]).sum(0)
        dist.all_reduce(sums, group=self.tp_group)
        self.weight_scale.copy_(scale_of(sums))
        self.drop_operands()

    @torch.no_grad()
    def update_mask(self) -> None:
        """Choose S for the present weight, and bring the operands up to both."""
        self.write_mask(CHOOSE[self.baseline.mask](self.weight.detach(), self.slope.n, self.slope.m))

    @torch.no_grad()
    def write_mask(self, bits: torch.Tensor) -> None:
        """S is this bitmask uint8 `[N, K/8]` from here on."""
        self.weight_mask.copy_(bits)
        # Whoever has a mask chosen for the weight says that the weight is there.
        self.mark_present("weight", "weight_mask")
        kept = self._kept
        if kept is None or not kept.reads(self.weight, self.pattern_buffers()):
            self.drop_operands()
            return
        kept.refresh(self.weight)
        kept.mark_last_pattern(self.weight_mask)

    def dense_weight(self) -> torch.Tensor:
        """What is multiplied, `[N, K]`: S W or b S(W)."""
        return self.build_operands(self.weight).weight_NK

    def build_operands(self, weight: torch.Tensor) -> MaskedOperands:
        self.check_initialized()
        return MaskedOperands(weight.detach(), self.weight_mask, self.weight_scale)

    def gradient_pruning(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if self.baseline.gradient != "largest":
            return None
        n, m = self.slope.n, self.slope.m
        if self.slope.token_groups == "sequence":
            return lambda dy: largest_along_tokens(dy, n, m)
        return lambda dy: largest_along_tokens(dy.flatten(0, -2), n, m)

    def gradient_rng(self) -> MvueRng | None:
        return self.current_rng() if self.baseline.gradient == "estimate" else None
