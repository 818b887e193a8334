"""GPU memory of one rank: what is taken, what the adapters add when they join, and ways out if it is too little."""

import dataclasses
import logging

import torch
from megatron.core import parallel_state

from slope_megatron.config import Config
from slope_megatron.models.layer_spec import pruned_modules, weights_to_prune
from slope_megatron.training.engine import Engine
from slope_megatron.training.telemetry import accounting
from slope_megatron.training.together import Agreed, first_problem

logger = logging.getLogger(__name__)
GIB = 2**30


class OutOfMemory(ValueError):
    """The device has no room for what a step needs."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on this rank's GPU: of tensors now and at the highest so far, held by torch, and not taken by anybody."""

    allocated: int
    peak: int
    reserved: int
    free: int
    total: int

    @property
    def room(self) -> int:
        """What the highest moment so far left over; fragments may make it less."""
        return self.free + self.reserved - self.peak


def measure(device: torch.device | int) -> Memory | None:
    """None: no GPU."""
    if torch.device(device).type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return Memory(
        allocated=torch.cuda.memory_allocated(device),
        peak=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
        free=free,
        total=total,
    )


def adapters_need(engine: Engine) -> dict[str, int]:
    """Bytes that the adapters take on this rank from their first step on, beyond what they have from the start.

    Their weights and optimizer state are there from the start. T tokens of a micro-batch, R rank, b bytes a number:

        gradients     as the ZeRO stage holds them, and the widest layer's own before they are added up
        activations   X L, b T R a layer and micro-batch in flight; recomputed blocks hold one block's. In e4m3 also X
                      itself, b T K for the T K that the layer kept of it until then
    """
    config, width = engine.config, engine.dtype.itemsize
    modules = [module for module in pruned_modules(engine.model) if hasattr(module, "adapter_l")]
    elements = [accounting.elements(module.adapter_l) + accounting.elements(module.adapter_r) for module in modules]
    with_them, without = (accounting.formula_rank_bytes(engine, adapters=on)["gradients"] for on in (True, False))
    tokens = config.data.seq_length * config.data.micro_batch_size
    kept = [config.slope.rank * width + own_input(module, config, width) for module in modules]
    in_flight = parallel_state.get_pipeline_model_parallel_world_size()
    held = sorted(kept)[-4:] if config.parallel.recompute == "full" else kept * in_flight
    return {
        "gradients": with_them - without + width * max(elements, default=0),
        "activations": tokens * sum(held),
    }


def own_input(module, config: Config, width: int) -> int:
    """Bytes a token by which X takes more than the rounded X that an e4m3 layer keeps without adapters."""
    gathered = config.parallel.sequence_parallel and module.partition_dim == 0
    if gathered or "wgrad" not in config.slope.float8_kinds:
        return 0
    return (width - 1) * 8 * module.pattern_buffers()[0].shape[1]


def adapters_report(need: dict[str, int], memory: Memory | None) -> tuple[str, bool]:
    """What the log says right before the adapters join, and whether they fit as far as can be told."""
    added = f"they add {gib(need['gradients'])} of gradients and {gib(need['activations'])} of activations"
    if memory is None:
        return f"adapters join: {added}", True
    taken = f"{gib(memory.allocated)} taken now, {gib(memory.peak)} at the highest so far, of {gib(memory.total)}"
    fits = sum(need.values()) <= memory.room
    left = f"{gib(memory.room)} are left for them" + ("" if fits else ", which is not enough")
    return f"adapters join: {taken}; {added}; {left}", fits


def form_needs(engine: Engine) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer on this rank's GPU: in this form of the model, and in its other one."""
    sizes = [accounting.formula_rank_bytes(engine, adapters=False, other_form=other) for other in (False, True)]
    if engine.config.parallel.offload_optimizer != "none":
        sizes = [{**one, "optimizer": 0} for one in sizes]
    here, there = (sum(one.values()) for one in sizes)
    if engine.form == "dense" and not engine.run_config.slope.packed:
        # A baseline's bitmask, and the masked copy of the weight.
        masked = sum(map(accounting.elements, weights_to_prune(engine.model, engine.run_config.slope)))
        there += masked * engine.dtype.itemsize + masked // 8
    return here, there


def check_forms(engine: Engine) -> None:
    """Refuse, before the first step, a run whose model has no room in its larger form; all ranks call it.

    Raises:
        Agreed: the state alone is more than the GPU has.
    """
    if engine.run_config.switches:
        here, there = form_needs(engine)
        problem = form_problem(engine.run_config, max(here, there), measure(engine.device))
        if problem := first_problem(problem):
            raise Agreed(problem)
        logger.info(
            "the model's form changes at steps %s: weights, gradients and optimizer take %s here as it is (%s), and %s "
            "in the other",
            *(" and ".join(map(str, engine.run_config.switches)), gib(here), engine.form, gib(there)),
        )


def form_problem(config: Config, need: int, memory: Memory | None) -> str | None:
    """What check_forms refuses; None: nothing."""
    if memory is None or need <= (there := memory.free + memory.reserved):
        return None
    return (
        f"dense steps (--slope-dense-start, --slope-dense-tail) need {gib(need)} of a GPU for weights, gradients and "
        f"optimizer, and it has {gib(there)}: take {ways_out(config)}, or leave them out"
    )


def warn_of_form(engine: Engine) -> None:
    """After a step of this form: whether the next form will have room, as far as can be told from this one's peak."""
    later = [step for step in engine.run_config.switches if step >= engine.steps_done]
    held = measure(engine.device)
    if held is None or not later:
        return
    here, there = form_needs(engine)
    if engine.form == "sparse":
        sizes = accounting.local_bytes(engine)["model"]
        here += sizes["patterns"] + sizes["operands"]
    if there - here > held.room:
        logger.warning(
            "from step %d on the model's other form takes %s more than this one, and %s are left at this one's peak: "
            "take %s before it comes",
            *(later[0], gib(there - here), gib(held.room), ways_out(engine.config)),
        )


def gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"


def explain(config: Config, rank: int, where: str, memory: Memory | None) -> str:
    """One sentence for a rank whose GPU is full: where it happened, what was taken, what to change."""
    taken = ""
    if memory is not None:
        others = memory.total - memory.free - memory.reserved
        taken = f" ({gib(memory.peak)} at the highest of {gib(memory.total)}, {gib(max(0, others))} by others)"
    return f"rank {rank} ran out of GPU memory {where}{taken}: take {ways_out(config)}"


def ways_out(config: Config) -> str:
    """What makes a run take less memory."""
    data, parallel = config.data, config.parallel
    replicas_help = parallel.zero_stage < 3 and parallel.pipeline_parallel == 1
    ways = [
        (data.micro_batch_size > 1, f"a --micro-batch-size under {data.micro_batch_size}"),
        (parallel.recompute != "full", "--recompute full"),
        (replicas_help, f"a --zero-stage above {parallel.zero_stage}, with several replicas"),
        (parallel.offload_optimizer == "none", "--offload-optimizer cpu"),
        (True, f"a --tensor-parallel above {parallel.tensor_parallel}"),
    ]
    return ", ".join(way for helps, way in ways if helps)
