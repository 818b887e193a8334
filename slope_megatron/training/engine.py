"""One training step: fetch, forward, backward, reduce, clip, step, refresh, log, in that order.

How forward, backward and reduce go depends on the ZeRO stage (`accumulation`). DeepSpeed then clips, updates its fp32
partitions and gathers the weights (stage 3: each layer's, when it is used).
"""

import dataclasses
import time
from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.config import Config
from slope_megatron.models.layer_spec import pruned_modules, sparse_modules
from slope_megatron.models.random_streams import attach_random_streams
from slope_megatron.training import baselines, cuda_graphs
from slope_megatron.training.forward import Forward
from slope_megatron.training.objectives import counts
from slope_megatron.training.optim import optimizer as optim
from slope_megatron.training.parallel import MODEL_PARALLEL_UNIT, seed_step
from slope_megatron.training.pattern_swaps import PatternSwaps
from slope_megatron.training.refresh import Refresh
from slope_megatron.training.schedule import Phases
from slope_megatron.training.zero import accumulation, gradients, partitions
from slope_megatron.training.zero.skipping import Skipping


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did: mean loss over the global batch (nats per token), global gradient norm before clipping.

    `skipped`: the loss or a gradient was not finite on some rank, so that nothing was updated on any (the norm is
    infinite then); the step counts. `bad`: that, but for fp16 gradients that a lower loss scale may mend.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    loss_scale: float = 1.0
    skipped: bool = False
    bad: bool = False


@dataclasses.dataclass(frozen=True)
class HeldGradients:
    """Gradients as measured before an update: bytes on this rank, bytes an element, and whether adapters had any."""

    bytes: int
    width: int
    adapters: bool


class Engine:
    """A model under DeepSpeed ZeRO, and the step counter.

    Args:
        model: of `config.form_at(first_step)`, which this engine trains.
        config: of the whole run.
        first_step: the step, counted from 0, that it is built for.
    """

    def __init__(self, model: torch.nn.Module, config: Config, dtype: torch.dtype, first_step: int = 0):
        partitions.check_offload(config)
        self.run_config = config
        self.config = config = config.form_at(first_step)
        self.dtype = dtype
        self.phases = Phases(config)
        self.steps_done = 0
        self.skipped_steps = 0
        # What each start of this run trained and took (`attempts`).
        self.attempts: list[dict] = []
        self.device = next(model.parameters()).device
        self.held_gradients: HeldGradients | None = None
        # Called one after the other, in this order, as a part of a step begins: "forward and backward"; "gradients",
        # which this rank has summed; "update", for which they are reduced and nothing is changed yet.
        self.observers: list[Callable[[str], None]] = []
        self.rng_state = attach_random_streams(model, config.train.seed)
        self.forward = Forward(model, config, self.rng_state)
        self.graphs = self.build_graphs(model)
        self.validated = self.graphs.function(self.validation_sums, "validation") if self.graphs else None
        gradients.mark_tied_copy(model)
        groups = optim.parameter_groups(model, config)
        self.members = {group["name"]: list(group["params"]) for group in groups}
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optim.build_optimizer(groups, config),
            mpu=MODEL_PARALLEL_UNIT,
            config=partitions.deepspeed_config(config, dtype, parallel_state.get_data_parallel_world_size()),
        )
        if self.graphs and self.device.type == "cuda":
            # The weights as they were built, on the stream that has been left: nobody will ask there again.
            torch.cuda.empty_cache()
        if config.optimizer.optimizer == "lamb":
            optim.attach_lamb(self.optimizer, self.members)
        baselines.add_decay(model, self.optimizer, optim.SPARSE)
        for pruned in pruned_modules(self.model):
            # `refresh` and whoever installs a state say when weights have changed.
            pruned.watches_values = False
        for module in sparse_modules(self.model):
            module.keep_operands = config.parallel.zero_stage < 3 or config.parallel.zero3_resident_operands
        self.refresh = Refresh(self.model, self.phases, self.graphs)
        self.accumulation = self.build_accumulation()
        self.skipping = Skipping(self.optimizer, self.device, getattr(self.accumulation, "bf16", None))
        # The caller owns the boundary: one update a step, after all micro-batches.
        self.deepspeed.set_gradient_accumulation_boundary(True)
        if config.slope.enabled and config.slope.baseline and config.slope.baseline.swaps:
            self.observers.append(PatternSwaps(self))
        self.enter_phase()

    @property
    def model(self) -> torch.nn.Module:
        return self.deepspeed.module

    @property
    def form(self) -> str:
        """Of the model: sparse, or dense for good or in a dense start or tail."""
        return "sparse" if self.config.slope.enabled else "dense"

    @property
    def loss_scale(self) -> float:
        """What losses, and so the gradients until the update, are multiplied with now: 1 but in fp16."""
        return float(self.optimizer.loss_scale) if self.dtype == torch.float16 else 1.0

    def build_graphs(self, model: torch.nn.Module) -> cuda_graphs.Graphs | None:
        """What captures micro-batches; None: they run eagerly. Before `deepspeed.initialize`."""
        if not cuda_graphs.wanted(self.config, self.dtype, self.device):
            return None
        cuda_graphs.leave_default_stream(self.device)
        self.rng_state.hold_key(self.device)
        return cuda_graphs.Graphs(model.modules(), parallel_state.get_tensor_model_parallel_group(), self.device)

    def build_accumulation(self) -> accumulation.Accumulation:
        """As the ZeRO stage and the pipeline stages want it."""
        if self.config.parallel.zero_stage > 1:
            return accumulation.CutGradients(self.forward, self.deepspeed)
        pipelined = self.config.parallel.pipeline_parallel > 1
        build = accumulation.PipelinedGradients if pipelined else accumulation.LocalGradients
        sent = partitions.grad_reduce_dtype(self.config, self.dtype)
        return build(self.forward, self.deepspeed, self.members, sent, self.graphs)

    def begin_part(self, part: str) -> None:
        for observer in self.observers:
            observer(part)

    # -- training -----------------------------------------------------------------------------------------------------

    def train_step(self, batches) -> StepResult:
        """One optimizer step over `batches`, the step's micro-batches of this replica (dicts of CPU tensors)."""
        started = time.perf_counter()
        step = self.steps_done
        self.enter_phase()
        self.model.train()
        self.begin_part("forward and backward")
        loss = self.forward_backward_reduce(list(batches))
        loss_scale = self.loss_scale
        for group in self.optimizer.param_groups:
            group["lr"] = self.phases.learning_rate(step, group["name"])
        mean_loss = self.skipping.decide(loss)
        self.begin_part("update")
        self.deepspeed.step()
        skipped = not self.deepspeed.was_step_applied()
        if skipped:
            gradients.clear_kept(self.optimizer)
        self.skipped_steps += skipped
        self.steps_done = step + 1
        self.refresh(self.steps_done)
        return StepResult(
            loss=mean_loss,
            grad_norm=float(self.deepspeed.get_global_grad_norm() or 0.0),
            learning_rate=self.config.optimizer.lr_at(step, self.config.train.steps),
            seconds=time.perf_counter() - started,
            loss_scale=loss_scale,
            skipped=skipped,
            bad=skipped and not self.skipping.scale_can_mend(loss_scale),
        )

    def enter_phase(self) -> None:
        """Bring the model into the phase of the next step: adapters join, with fresh optimizer state."""
        step = self.steps_done
        if self.config.model.dropout:
            seed_step(self.config, step)
        for module in pruned_modules(self.model):
            module.adapters_active = self.phases.adapters_on(step)
        self.rng_state.step = step
        if self.phases.adapters_join(step):
            partitions.reset_state(self.optimizer, optim.ADAPTERS)

    def forward_backward_reduce(self, batches: list[dict]) -> torch.Tensor:
        """Reduced gradients of all micro-batches; returns the mean loss over the global batch, fp64 on the device."""
        loss = self.accumulation.run(batches, self.mean_counts(batches))
        self.begin_part("gradients")
        self.note_gradients(self.accumulation.held())
        self.accumulation.reduce()
        total = self.sum_over_ranks(loss.double().to(self.device))
        return total / parallel_state.get_data_parallel_world_size()

    def mean_counts(self, batches: list[dict]) -> torch.Tensor:
        """What the losses of this step are divided by, from its batches alone: see `objectives`; on the device.

        Of a global batch in which no token counts the loss is 0: 0 / 1.
        """
        total = self.forward.sent(torch.stack([counts(batch) for batch in batches]).sum(0))
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.clamp_(min=1) / (len(batches) * parallel_state.get_data_parallel_world_size())

    def note_gradients(self, tensors) -> None:
        """Keep what this rank's gradients take, for the accounting; once, in the first step."""
        if self.held_gradients is None:
            # Those on an NVMe disk are not here.
            tensors = [tensor for tensor in tensors if tensor is not None]
            width = tensors[0].element_size() if tensors else torch.float32.itemsize
            adapters = self.phases.adapters_on(self.steps_done)
            self.held_gradients = HeldGradients(partitions.storage_bytes(tensors), width, adapters)

    def summed_loss(self, batch: dict, output):
        """A validation micro-batch's loss and token count, not yet divided: it may hold masked samples as fillers."""
        mask = batch["loss_mask"].double()
        sums = torch.stack([(self.forward.objective.token_losses(output).double() * mask).sum(), mask.sum()])
        return sums[0].clone(), {"sums": sums}

    def validation_sums(self, batch: dict) -> torch.Tensor:
        """The same of a batch on the device: `[loss, tokens]`."""
        return self.summed_loss(batch, self.forward.output(self.model, batch))[1]["sums"]

    # -- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches) -> float:
        """Mean loss in nats per token over the tokens that count in all replicas' `batches`."""
        self.model.eval()
        if self.validated is None:
            reports = self.forward.schedule(batches, self.summed_loss, forward_only=True)
            results = [report["sums"] for report in reports]
        else:
            batches = list(batches)
            self.validated.begin(batches)
            results = [self.validated(batch) for batch in batches]
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for result in results:
            sums += result
        loss, tokens = self.sum_over_ranks(sums).tolist()
        return loss / max(tokens, 1.0)

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Over pipeline stages (all but the last hold zero) and replicas; tensor-parallel ranks hold the same."""
        dist.all_reduce(value, group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        return value
