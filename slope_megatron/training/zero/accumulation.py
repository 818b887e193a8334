"""How one step's gradients come about: `run` the micro-batches, then `reduce` what they have left.

LocalGradients       stage 1: gradients add up on each rank; then the sums within the model and one reduction over the
                     data-parallel ranks (`reduction`: our own where DeepSpeed's rounds)
PipelinedGradients   the same over pipeline stages, which Megatron's schedule runs (1F1B)
CutGradients         stages 2 and 3: DeepSpeed's hooks reduce and cut each gradient as soon as it is there, in every
                     micro-batch; sums within the model happen before, in autograd

`micro_batch` is forward, backward and accumulation of one micro-batch: tensors on the device in, a tensor there out. It
never waits for the device, so that a CUDA graph can capture it; what is keyed on the host is set before, by `begin`.
"""

import abc
import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.training.cuda_graphs import Graphs
from slope_megatron.training.forward import Forward
from slope_megatron.training.objectives import Batch
from slope_megatron.training.zero import gradients
from slope_megatron.training.zero.reduction import Bf16Gradients


class Accumulation(abc.ABC):
    """Of one engine.

    Args:
        zero: DeepSpeed's engine.
    """

    def __init__(self, forward: Forward, zero):
        self.forward, self.zero = forward, zero

    def run(self, batches: list[Batch], count: torch.Tensor) -> torch.Tensor:
        """Gradients of all micro-batches on this rank; its mean loss (zero but on the last stage).

        Args:
            batches: on the CPU.
            count: what each one's loss is divided by, see `objectives`.
        """
        losses = []
        for index, batch in enumerate(batches):
            self.begin(index, last=index == len(batches) - 1)
            losses.append(self.micro_batch(self.forward.to_device(batch), count, len(batches)))
        return torch.stack(losses).mean()

    def begin(self, index: int, *, last: bool) -> None:
        """What a micro-batch needs on the host; `index` counts from 0."""
        self.forward.begin(index)

    @abc.abstractmethod
    def micro_batch(self, batch: Batch, count: torch.Tensor, of: int) -> torch.Tensor:
        """One micro-batch of so many; its loss."""

    @abc.abstractmethod
    def held(self) -> list[torch.Tensor]:
        """The tensors that hold this rank's gradients between `run` and `reduce`."""

    @abc.abstractmethod
    def reduce(self) -> None:
        """Sums within the model, then the mean over the replicas."""


class LocalGradients(Accumulation):
    """ZeRO-1 without pipeline stages.

    Args:
        members: the parameters of each group by its name, as they were before `deepspeed.initialize`.
        sent: the type in which bf16 training's fp32 sums travel.
        graphs: capture micro-batches; None: they run eagerly.
    """

    def __init__(
        self,
        forward: Forward,
        zero,
        members: dict[str, list[torch.nn.Parameter]],
        sent: torch.dtype,
        graphs: Graphs | None = None,
    ):
        super().__init__(forward, zero)
        # Only DeepSpeed's bf16 optimizer keeps fp32 sums of its own.
        own_sums = hasattr(zero.optimizer, "fp32_groups_gradients_flat")
        self.bf16 = Bf16Gradients(zero.optimizer, members, sent) if own_sums else None
        # A schedule over stages scales the loss where it is born: on the last one.
        megatron: Any = forward.model.config
        megatron.grad_scale_func = self.scaled
        self.replayed = graphs.function(self.micro_batch, "training") if graphs else None
        # Where graphs read what losses are divided by.
        self.count: torch.Tensor | None = None

    def run(self, batches: list[Batch], count: torch.Tensor) -> torch.Tensor:
        if self.replayed is None:
            return super().run(batches, count)
        self.count = count if self.count is None else self.count.copy_(count)
        self.replayed.begin(batches, len(batches))
        losses = []
        for index, batch in enumerate(batches):
            self.begin(index, last=index == len(batches) - 1)
            losses.append(self.replayed(batch, self.count, len(batches)))
        return torch.stack(losses).mean()

    def micro_batch(self, batch: Batch, count: torch.Tensor, of: int) -> torch.Tensor:
        loss = self.forward.loss(self.forward.model, batch, count)
        self.scaled(loss / of).backward()
        return loss.detach()

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """fp16's loss, so that small gradients do not vanish."""
        return loss * self.zero.optimizer.loss_scale if self.zero.fp16_enabled() else loss

    def held(self) -> list[torch.Tensor]:
        return gradients.held(self.forward.model, self.zero.optimizer)

    def reduce(self) -> None:
        gradients.sum_sequence_parallel(self.forward.model)
        gradients.sum_tied_copies(self.forward.model)
        if self.bf16:
            self.bf16.reduce()
        else:
            self.zero.allreduce_gradients()


class PipelinedGradients(LocalGradients):
    """ZeRO-1 over pipeline stages."""

    def run(self, batches: list[Batch], count: torch.Tensor) -> torch.Tensor:
        results = self.forward.schedule(batches, functools.partial(self.report, count), forward_only=False)
        return torch.stack([result["loss"] for result in results]).mean() if results else torch.zeros(())

    def report(self, count: torch.Tensor, batch: Batch, output):
        """A micro-batch's loss for the schedule, and a copy for the log: the schedule divides the loss in place."""
        loss = self.forward.objective.loss(batch, output, count)
        return loss, {"loss": loss.detach().clone()}


class CutGradients(Accumulation):
    """ZeRO-2 and ZeRO-3."""

    def __init__(self, forward: Forward, zero):
        super().__init__(forward, zero)
        sum_in_autograd(forward.model)

    def begin(self, index: int, *, last: bool) -> None:
        super().begin(index, last=last)
        self.zero.set_gradient_accumulation_boundary(last)

    def micro_batch(self, batch: Batch, count: torch.Tensor, of: int) -> torch.Tensor:
        loss = self.forward.loss(self.zero, batch, count)
        self.zero.backward(loss)  # which divides the loss, and scales it in fp16
        return loss.detach()

    def held(self) -> list[torch.Tensor]:
        return gradients.held_cut(self.zero.optimizer)

    def reduce(self) -> None:
        """Done in every backward."""


def sum_in_autograd(model: torch.nn.Module) -> None:
    """Norms and row biases see this rank's part of the sequence: sum their gradients over the TP ranks as they come."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(summed)
