"""Whether a step updates: all ranks decide it together, and DeepSpeed's optimizer is told.

A step is skipped if the loss or any gradient is not finite on any rank. DeepSpeed would decide otherwise: its norm
leaves out what several tensor-parallel ranks hold, so that a spoiled copy on one of them is applied; with offload it
knows what backward measured and no more; and it has no say in the loss.

It is told where it asks: in its overflow check and in its norm, which is not a number then. Nothing is written into
gradients for that: DeepSpeed uses the memory of many again, and what no later backward overwrites (the gradients of
adapters that have not joined) would spoil every step to come.
"""

import math

import torch
import torch.distributed as dist

from slope_megatron.training.zero import gradients, partitions


class Skipping:
    """Replaces the checks in DeepSpeed's optimizers (0.19's; the names with an underscore are private).

        ZeRO 1, 2         check_overflow
        ZeRO 3            check_overflow in fp16, _get_norm_groups in every type
        bf16 at ZeRO 1    get_grads_for_norm

    Args:
        optimizer: DeepSpeed's.
        device: where collectives take their tensors from.
    """

    def __init__(self, optimizer, device: torch.device):
        self.optimizer, self.device = optimizer, device
        # Whether any rank's was not finite in the present step; the same on all ranks.
        self.bad_loss = self.bad_gradients = False
        self.scaler = getattr(optimizer, "loss_scaler", None)
        if self.scaler is not None:
            self.update_scale = self.scaler.update_scale
            self.scaler.update_scale = self.update_scale_for_gradients
            # Whoever counts bad steps ends the run, not an exception without a way out.
            self.scaler.raise_error_at_min_scale = False
        if hasattr(optimizer, "get_grads_for_norm"):
            self.gradients_for_norm = optimizer.get_grads_for_norm
            optimizer.get_grads_for_norm = self.told_gradients_for_norm
            return
        # Stages 1 and 2 ask for fp16 only, unless this is set.
        optimizer.check_grad_overflow = True
        optimizer.check_overflow = self.told_overflow
        if partitions.is_stage_3(optimizer):
            self.norm_groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = self.told_norm_groups

    @property
    def skips(self) -> bool:
        return self.bad_loss or self.bad_gradients

    def decide(self, loss: float) -> None:
        """Look at the step whose gradients are reduced; collective over all ranks.

        Args:
            loss: this rank's; tensor-parallel ranks may disagree where one of them failed.
        """
        here = [int(not math.isfinite(loss)), int(not gradients.are_finite(self.optimizer))]
        flags = torch.tensor(here, device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.bad_loss, self.bad_gradients = map(bool, flags.tolist())

    def scale_can_mend(self, loss_scale: float) -> bool:
        """Whether only gradients were not finite, which overflowed at this loss scale and may not at the next."""
        can_fall = self.scaler is not None and self.scaler.dynamic and loss_scale > self.scaler.min_scale
        return can_fall and not self.bad_loss

    # -- what DeepSpeed asks ------------------------------------------------------------------------------------------

    def told_overflow(self, partition_gradients: bool = True) -> None:
        self.optimizer.overflow = self.skips

    def told_norm_groups(self) -> list[torch.Tensor]:
        return [torch.tensor(math.nan, device=self.device)] if self.skips else self.norm_groups()

    def told_gradients_for_norm(self, for_clipping: bool = False):
        if self.skips:
            return [torch.tensor([math.nan], device=self.device)], {}
        return self.gradients_for_norm(for_clipping=for_clipping)

    def update_scale_for_gradients(self, overflow: bool) -> None:
        """The loss is not scaled when it is measured: one that is not finite says nothing about the scale."""
        if not self.bad_loss:
            self.update_scale(overflow)
