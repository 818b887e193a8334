"""A replica's micro-batches through the model: each alone, or by Megatron's schedule over the pipeline stages."""

import functools
from collections.abc import Callable, Iterable

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from slope_megatron.config import Config
from slope_megatron.layers.random_streams import RngState
from slope_megatron.training.objectives import OBJECTIVES, Batch


class Forward:
    """Calls the model as its objective wants it, and keeps random numbers keyed to the micro-batch.

    Args:
        model: bare, with the configuration that Megatron's schedule reads.
        rng_state: of the pruned gradients.
    """

    def __init__(self, model: torch.nn.Module, config: Config, rng_state: RngState):
        self.model, self.config, self.rng_state = model, config, rng_state
        self.objective = OBJECTIVES[config.model.architecture]
        self.device = next(model.parameters()).device

    def sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host, on the device; the host goes on, and an earlier step's kernels are not waited for."""
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)

    def to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def begin(self, index: int) -> None:
        """Key the random numbers to this replica's micro-batch `index` of the step, counted from 0."""
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.rng_state.micro_batch = index * replicas + replica
        self.rng_state.write_key()

    def output(self, model: torch.nn.Module, batch: Batch):
        """What `model` (the bare one, or DeepSpeed's engine around it) makes of a batch on the device."""
        return self.rng_state.follow(self.objective.forward(model, batch))

    def loss(self, model: torch.nn.Module, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """A micro-batch's loss, divided by `count` (see `objectives`)."""
        return self.objective.loss(batch, self.output(model, batch), count)

    def schedule(self, batches: Iterable[Batch], loss_of: Callable, *, forward_only: bool) -> list[dict]:
        """Megatron's schedule (1F1B with stages) over the bare model; what `loss_of` reported of each batch."""

        def forward_step(iterator, model):
            index, batch = next(iterator)
            batch = self.to_device(batch)
            self.begin(index)
            return self.output(model, batch), functools.partial(loss_of, batch)

        batches = list(batches)
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=enumerate(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.data.micro_batch_size,
            forward_only=forward_only,
        )
