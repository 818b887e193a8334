"""Whether a step updates: all ranks decide it together, and DeepSpeed's optimizer is told.

A step is skipped if the loss or any gradient is not finite on any rank. DeepSpeed would decide otherwise: its norm
leaves out what several tensor-parallel ranks hold, so that a spoiled copy on one of them is applied; with offload it
knows what backward measured and no more; and it has no say in the loss.

It is told where it asks: in its overflow check and in its norm, which is not a number then; in bf16 at ZeRO 1 the
update is ours. Nothing is written into gradients for that: DeepSpeed uses the memory of many again, and what no later
backward overwrites (the gradients of adapters that have not joined) would spoil every step to come.
"""

import math

import torch
import torch.distributed as dist

from slope_megatron.training.zero import gradients, partitions
from slope_megatron.training.zero.reduction import Bf16Gradients


class Skipping:
    """Replaces the checks in DeepSpeed's optimizers (0.19's; the names with an underscore are private).

        ZeRO 1, 2         check_overflow
        ZeRO 3            check_overflow in fp16, _get_norm_groups in every type
        bf16 at ZeRO 1    step

    Args:
        optimizer: DeepSpeed's.
        device: where collectives take their tensors from.
        bf16: what replaces that step.
    """

    def __init__(self, optimizer, device: torch.device, bf16: Bf16Gradients | None = None):
        self.optimizer, self.device, self.bf16 = optimizer, device, bf16
        # Whether any rank's was not finite in the present step; the same on all ranks.
        self.bad_loss = self.bad_gradients = False
        self.scaler = getattr(optimizer, "loss_scaler", None)
        if self.scaler is not None:
            self.update_scale = self.scaler.update_scale
            self.scaler.update_scale = self.update_scale_for_gradients
            # Whoever counts bad steps ends the run, not an exception without a way out.
            self.scaler.raise_error_at_min_scale = False
        if bf16 is not None:
            # What `decide` has read of the gradients.
            self.norm = math.nan
            optimizer.step = self.bf16_step
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

    def decide(self, loss: torch.Tensor) -> float:
        """Look at the step whose gradients are reduced; collective over all ranks. It waits for the device, once.

        Args:
            loss: the global batch's mean, on the device; tensor-parallel ranks may disagree where one of them failed.
        Returns:
            the loss.
        """
        if self.bf16 is None:
            norm, finite = torch.zeros_like(loss), gradients.finite(self.optimizer).to(self.device)
        else:
            norm, finite = self.bf16.norm(), self.bf16.copies_are_finite()
        bad = torch.stack([loss.isfinite(), finite & norm.isfinite()]).logical_not().to(loss.dtype)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        bad_loss, bad_gradients, mean, self.norm = torch.cat([bad, torch.stack([loss, norm.to(loss.dtype)])]).tolist()
        self.bad_loss, self.bad_gradients = bool(bad_loss), bool(bad_gradients)
        return mean

    def scale_can_mend(self, loss_scale: float) -> bool:
        """Whether only gradients were not finite, which overflowed at this loss scale and may not at the next."""
        can_fall = self.scaler is not None and self.scaler.dynamic and loss_scale > self.scaler.min_scale
        return can_fall and not self.bad_loss

    # -- what DeepSpeed asks ------------------------------------------------------------------------------------------

    def told_overflow(self, partition_gradients: bool = True) -> None:
        self.optimizer.overflow = self.skips

    def told_norm_groups(self) -> list[torch.Tensor]:
        return [torch.tensor(math.nan, device=self.device)] if self.skips else self.norm_groups()

    def bf16_step(self) -> None:
        assert self.bf16 is not None
        self.bf16.step(self.norm, skip=self.skips)

    def update_scale_for_gradients(self, overflow: bool) -> None:
        """The loss is not scaled when it is measured: one that is not finite says nothing about the scale."""
        if not self.bad_loss:
            self.update_scale(overflow)
