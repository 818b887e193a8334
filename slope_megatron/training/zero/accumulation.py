"""How one step's gradients come about: two ways to run the micro-batches, one for each kind of ZeRO stage.

ThroughSchedule   stage 1: Megatron's schedule (1F1B with stages) on the bare module, so that gradients add up
                  locally; then the sums within the model and one reduction over the data-parallel ranks
                  (`reduction`: our own where DeepSpeed's rounds)
ThroughHooks      stages 2 and 3: DeepSpeed's forward and backward, whose hooks reduce and cut each gradient as soon
                  as it is there, in every micro-batch; sums within the model happen before, in autograd
"""

import functools

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.training.zero import gradients, partitions
from slope_megatron.training.zero.reduction import Bf16Gradients


class ThroughSchedule:
    """ZeRO-1."""

    def __init__(self, engine):
        self.engine = engine
        # Only DeepSpeed's bf16 optimizer keeps fp32 sums of its own.
        own_sums = hasattr(engine.optimizer, "fp32_groups_gradients_flat")
        sent = partitions.grad_reduce_dtype(engine.config, engine.dtype)
        self.bf16 = Bf16Gradients(engine.optimizer, engine.members, sent) if own_sums else None
        if engine.dtype == torch.float16:
            # The schedule scales the loss where it is born: on the last stage.
            engine.model.config.grad_scale_func = lambda loss: loss * engine.optimizer.loss_scale

    def run(self, batches: list[dict], count: torch.Tensor) -> torch.Tensor:
        """Reduced gradients of all micro-batches; this rank's mean loss (zero but on the last stage).

        Args:
            count: what each one's loss is divided by, see `objectives`.
        """
        engine = self.engine
        results = engine.schedule(batches, functools.partial(engine.training_loss, count), forward_only=False)
        engine.on_part("gradients")
        gradients.sum_sequence_parallel(engine.model)
        gradients.sum_tied_copies(engine.model)
        engine.note_gradients(gradients.held(engine.model, engine.optimizer))
        if self.bf16:
            self.bf16.reduce()
        else:
            engine.deepspeed.allreduce_gradients()
        # Only the last pipeline stage has losses.
        return torch.stack([result["loss"] for result in results]).mean() if results else torch.zeros(())


class ThroughHooks:
    """ZeRO-2 and ZeRO-3."""

    def __init__(self, engine):
        self.engine = engine
        sum_in_autograd(engine.model)

    def run(self, batches: list[dict], count: torch.Tensor) -> torch.Tensor:
        """Reduced and cut gradients of all micro-batches; this rank's mean loss. `count`: as above."""
        engine = self.engine
        losses = []
        for index, batch in enumerate(batches):
            engine.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            batch = engine.to_device(batch)
            loss = engine.objective.loss(batch, engine.forward(engine.deepspeed, index, batch), count)
            losses.append(loss.detach().clone())
            engine.deepspeed.backward(loss)
        engine.note_gradients(gradients.held_cut(engine.optimizer))
        return torch.stack(losses).mean()


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


def build(engine) -> ThroughSchedule | ThroughHooks:
    """The way of the engine's stage."""
    return (ThroughSchedule if engine.config.parallel.zero_stage == 1 else ThroughHooks)(engine)
