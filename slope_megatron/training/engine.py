"""One training step: fetch, forward, backward, reduce, clip, step, refresh, log, in that order.

Megatron's schedule runs the micro-batches on the bare module, so that gradients add up locally; DeepSpeed ZeRO-1 then
reduces them over the data-parallel ranks once, clips, updates its fp32 partitions and gathers the weights.
"""

import dataclasses
import functools
import time

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from slope_megatron.config import Config
from slope_megatron.models.draws import attach_draws
from slope_megatron.models.fill import pruned_modules, sparse_modules
from slope_megatron.training import baselines, gradients
from slope_megatron.training import optimizer as optim
from slope_megatron.training.objectives import OBJECTIVES
from slope_megatron.training.parallel import ModelParallelUnit, seed_step
from slope_megatron.training.phases import Phases


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did: mean loss over the global batch (nats per token), global gradient norm before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float


class Engine:
    """A model under DeepSpeed ZeRO-1, and the step counter."""

    def __init__(self, model: torch.nn.Module, config: Config, dtype: torch.dtype):
        self.config = config
        self.phases = Phases(config)
        self.objective = OBJECTIVES[config.model.architecture]
        self.steps_done = 0
        self.device = next(model.parameters()).device
        self.gradient_bytes: dict[str, int] = {}
        self.draws = attach_draws(model, config.train.seed)
        gradients.mark_tied_copy(model)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optim.build_adamw(model, config),
            mpu=ModelParallelUnit,
            config=optim.deepspeed_config(config, dtype, parallel_state.get_data_parallel_world_size()),
        )
        baselines.add_decay(model, self.optimizer, optim.SPARSE)
        # The caller owns the boundary: one reduction a step, after all micro-batches.
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.enter_phase()

    @property
    def model(self) -> torch.nn.Module:
        return self.deepspeed.module

    # -- training -----------------------------------------------------------------------------------------------------

    def train_step(self, batches) -> StepResult:
        """One optimizer step over `batches`, the step's micro-batches of this replica (dicts of CPU tensors)."""
        started = time.perf_counter()
        step = self.steps_done
        self.enter_phase()
        self.model.train()
        loss = self.forward_backward(list(batches))
        self.reduce_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.phases.learning_rate(step, group["name"])
        self.deepspeed.step()
        self.steps_done = step + 1
        self.refresh()
        return StepResult(
            loss=loss,
            grad_norm=float(self.deepspeed.get_global_grad_norm() or 0.0),
            learning_rate=self.config.optimizer.lr_at(step, self.config.train.steps),
            seconds=time.perf_counter() - started,
        )

    def enter_phase(self) -> None:
        """Bring the model into the phase of the next step: adapters join, with fresh optimizer state."""
        step = self.steps_done
        if self.config.model.dropout:
            seed_step(self.config.train.seed, step)
        for module in pruned_modules(self.model):
            module.adapters_active = self.phases.adapters_on(step)
        baselines.enter_phase(self.model, self.phases, step)
        self.draws.step = step
        if self.phases.adapters_join(step):
            optim.reset_state(self.optimizer, optim.ADAPTERS)

    def forward_backward(self, batches: list[dict]) -> float:
        """Gradients of all micro-batches, added up; returns the mean loss over the global batch."""
        results = self.schedule(batches, self.training_loss, forward_only=False)
        # Only the last pipeline stage has losses.
        loss = torch.stack([result["loss"] for result in results]).mean() if results else torch.zeros(())
        total = self.sum_over_ranks(loss.double().to(self.device))
        return float(total) / parallel_state.get_data_parallel_world_size()

    def schedule(self, batches: list[dict], loss_of, *, forward_only: bool) -> list[dict]:
        """Megatron's schedule (1F1B with stages) over the bare module; what `loss_of` reported of each batch."""

        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

        def forward_step(iterator, model):
            index, batch = next(iterator)
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            self.draws.micro_batch = index * replicas + replica
            return self.draws.follow(self.objective.forward(model, batch)), functools.partial(loss_of, batch)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=enumerate(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.data.micro_batch_size,
            forward_only=forward_only,
        )

    def training_loss(self, batch: dict, output):
        """A micro-batch's loss for the schedule, and a copy for the log: the schedule divides the loss in place."""
        loss = self.objective.loss(batch, output)
        return loss, {"loss": loss.detach().clone()}

    def summed_loss(self, batch: dict, output):
        """A validation micro-batch's loss and token count, not yet divided: it may hold masked samples as fillers."""
        mask = batch["loss_mask"].double()
        sums = torch.stack([(self.objective.token_losses(output).double() * mask).sum(), mask.sum()])
        return sums[0].clone(), {"sums": sums}

    def reduce_gradients(self) -> None:
        """Complete the gradients within the model, then average them over the data-parallel ranks."""
        gradients.sum_sequence_parallel(self.model)
        gradients.sum_tied_copies(self.model)
        if not self.gradient_bytes:
            self.gradient_bytes = gradients.measured_bytes(self.model)
        self.deepspeed.allreduce_gradients()

    def refresh(self) -> None:
        """After the weights' gather: operands follow the values, and the column pattern when its step has come."""
        choose = self.phases.new_column_pattern(self.steps_done)
        for module in sparse_modules(self.model):
            if choose:
                module.update_column_pattern()
            else:
                module.refresh()
        baselines.refresh(self.model, self.phases, self.steps_done)

    # -- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches) -> float:
        """Mean loss in nats per token over the tokens that count in all replicas' `batches`."""
        self.model.eval()
        results = self.schedule(list(batches), self.summed_loss, forward_only=True)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for result in results:
            sums += result["sums"]
        loss, tokens = self.sum_over_ranks(sums).tolist()
        return loss / tokens

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Over pipeline stages (all but the last hold zero) and replicas; tensor-parallel ranks hold the same."""
        dist.all_reduce(value, group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        return value
