"""DeepSpeed's ZeRO: its JSON, and one view of what its stages make of weights and optimizer state.

    stage 1   the optimizer's fp32 state is cut over the data-parallel ranks: one flat partition a parameter group
    stage 2   reduced gradients are cut with it
    stage 3   so are the weights: outside the layer that uses it a parameter is empty; one flat partition a sub-group

The model is built whole on every replica and cut by `deepspeed.initialize`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import TypeGuard

import deepspeed
import torch
import torch.distributed as dist

from slope_megatron.config import Config
from slope_megatron.config.parallel import reduced_dtype
from slope_megatron.models.provider import DTYPES
from slope_megatron.training.optim.lamb import Lamb
from slope_megatron.training.together import first_problem
from slope_megatron.training.zero import offload

# Stage 3 keeps parameters up to this size, biases and norms, gathered: many small messages cost more than they hold.
SMALL_PARAMETER = 100_000
MOMENTS = ("exp_avg", "exp_avg_sq")
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def deepspeed_config(config: Config, dtype: torch.dtype, data_parallel: int) -> dict:
    """DeepSpeed's JSON of this run: the stage, offload, precision, clipping."""
    parallel, optimizer = config.parallel, config.optimizer
    zero: dict[str, object] = {"stage": parallel.zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    if parallel.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = small_parameter(config)
    if parallel.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif parallel.offload_optimizer == "nvme":
        zero["offload_optimizer"] = offload.settings(config)
    settings: dict[str, object] = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": config.data.micro_batches(data_parallel),
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # Its timer waits for the device in every forward and in every step; the loop has the whole step's time.
        "timers": {"throughput": {"enabled": False}},
    }
    reduced = grad_reduce_dtype(config, dtype)
    if reduced != dtype:
        # Unset, it is the parameters' type. In bf16 at stage 1 the reduction is ours (`reduction`).
        settings["communication_data_type"] = NAMES[reduced]
        # Stage 2 would divide by the number of replicas before it converts; this way after the sum, for the same bytes.
        zero["reduce_scatter"] = parallel.zero_stage != 2
    if dtype in (torch.bfloat16, torch.float16):
        # fp32 accumulation over micro-batches.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == torch.bfloat16:
        # Under Megatron's schedule DeepSpeed's own end-of-backward hook never runs: accumulate at once.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if dtype == torch.float16:
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": int(math.log2(optimizer.initial_loss_scale)),
            "loss_scale_window": optimizer.loss_scale_window,
            "hysteresis": optimizer.loss_scale_hysteresis,
            "min_loss_scale": 1,
        }
    return settings


def grad_reduce_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients travel between the replicas; `dtype`: the parameters'."""
    parallel = config.parallel
    return DTYPES[reduced_dtype(parallel.grad_reduce_dtype, NAMES[dtype], parallel.zero_stage)]


def small_parameter(config: Config) -> int:
    """Elements up to which stage 3 keeps a parameter whole on every rank."""
    return min(SMALL_PARAMETER, 4 * config.model.hidden_size)


def check_offload(config: Config) -> None:
    """Refuse an offload that cannot run here; all ranks call it.

    Raises:
        ValueError: one sentence, the same on every rank.
    """
    if config.parallel.offload_optimizer == "nvme" and (reason := first_problem(offload.unsupported(config))):
        raise ValueError(f"--offload-optimizer is nvme {reason}; use --offload-optimizer cpu")


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind tensors, where several are views of one buffer counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# -- parameters --------------------------------------------------------------------------------------------------------


class CutParameter(torch.nn.Parameter):
    """A parameter as stage 3 leaves it: empty, with DeepSpeed's notes of what was there. A type, never called."""

    # This rank's part, flat; of the whole parameter shape and elements; the ranks that share it.
    ds_tensor: torch.Tensor
    ds_shape: torch.Size
    ds_numel: int
    ds_process_group: dist.ProcessGroup


def is_cut(parameter: torch.nn.Parameter) -> TypeGuard[CutParameter]:
    """Whether stage 3 has taken the parameter over; it may be whole now."""
    return hasattr(parameter, "ds_shape")


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    """The parameter's shape on this tensor-parallel rank, also while stage 3 has cut it."""
    return parameter.ds_shape if is_cut(parameter) else parameter.shape


def gathered(*parameters: torch.nn.Parameter):
    """Within this context the parameters are whole, to read; all data-parallel ranks enter it together."""
    return deepspeed.zero.GatheredParameters(list(parameters))


def write_cut(parameter: CutParameter, value: torch.Tensor) -> None:
    """Give a parameter that stage 3 has cut a new value, the same on every rank, without any communication."""
    part = own_part(parameter, value)
    parameter.ds_tensor.data.copy_(part)
    if parameter.shape == parameter.ds_shape:
        parameter.data.copy_(value)


def own_part(parameter: CutParameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor as stage 3 cuts it, zeros after the end."""
    room = parameter.ds_tensor.numel()
    start = room * dist.get_rank(parameter.ds_process_group)
    part = value.new_zeros(room)
    own = value.flatten()[start : start + room]
    part[: own.numel()] = own
    return part


@contextlib.contextmanager
def whole_shapes(model: torch.nn.Module) -> Iterator[None]:
    """Within this context cut parameters have their whole shape and no values: for code that only reads shapes."""
    cut = [one for one in model.parameters() if is_cut(one) and one.shape != one.ds_shape]
    parts = [parameter.data for parameter in cut]
    for parameter in cut:
        parameter.data = parameter.data.new_zeros(()).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, part in zip(cut, parts, strict=True):
            parameter.data = part


# -- optimizer state ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Segment:
    """The part of one parameter that a flat partition holds: `numel` elements from `start` on; none: 0."""

    parameter: torch.nn.Parameter
    start: int
    numel: int


@dataclasses.dataclass(frozen=True)
class Partition:
    """A flat piece of fp32 masters on this rank, its group in the base optimizer, and its number."""

    group: dict
    masters: torch.Tensor
    index: int


def of(optimizer) -> list[Partition]:
    """All partitions of DeepSpeed's optimizer on this rank."""
    groups = optimizer.optimizer.param_groups
    if not is_stage_3(optimizer):
        found = [(group, masters) for group in groups for masters in group["params"]]
        return [Partition(group, masters, index) for index, (group, masters) in enumerate(found)]
    flats = optimizer.fp32_partitioned_groups_flat
    return [Partition(groups[optimizer.sub_group_to_group_id[index]], flat, index) for index, flat in enumerate(flats)]


def is_stage_3(optimizer) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def segments(optimizer, members: dict[str, list[torch.nn.Parameter]]) -> list[list[Segment]]:
    """Where each parameter lies, for each of `of(optimizer)`; the parameters in the same order on every rank.

    Args:
        members: the parameters of each group by its name, as they were before `deepspeed.initialize`.
    """

    def fragment(parameter: torch.nn.Parameter) -> Segment:
        mapping = mapping_of(parameter)
        address = mapping.get_hp_fragment_address() if mapping is not None else None
        return Segment(parameter, address.start, address.numel) if address else Segment(parameter, 0, 0)

    def even_part(parameter: CutParameter) -> Segment:
        # Stage 3 cuts every parameter evenly; the last parts may hold fewer elements than the room they take.
        _, start, room = optimizer.grad_position[optimizer.get_param_id(parameter)]
        before = room * dist.get_rank(parameter.ds_process_group)
        return Segment(parameter, start, max(0, min(room, parameter.ds_numel - before)))

    if is_stage_3(optimizer):
        return [list(map(even_part, group)) for group in optimizer.fp16_groups]
    return [list(map(fragment, members[part.group["name"]])) for part in of(optimizer)]


def mapping_of(parameter: torch.nn.Parameter):
    """Stages 1 and 2: DeepSpeed's note of where a parameter lies in the fp32 partition; None: this rank has nothing."""
    return vars(parameter)["_hp_mapping"]


def stage_3_state(optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Views of this rank's masters ("fp32") and moments of one parameter, its room in the flat partition."""
    index, start, room = optimizer.grad_position[optimizer.get_param_id(parameter)]
    masters = optimizer.fp32_partitioned_groups_flat[index]
    tensors = {"fp32": masters.data, **{name: optimizer.optimizer.state[masters][name] for name in MOMENTS}}
    return {kind: tensor.narrow(0, start, room) for kind, tensor in tensors.items()}


def create_state(optimizer) -> None:
    """The state (zeros) that the optimizer would create in its first step, in its own form."""
    base = optimizer.optimizer
    for partition in of(optimizer):
        state = base.state[partition.masters]
        if state:
            continue
        if isinstance(base, (torch.optim.AdamW, Lamb)):
            device = partition.masters.device if partition.group.get("fused") else None
            state["step"] = torch.tensor(0.0, device=device)
        elif type(base).__module__.startswith("apex."):
            partition.group.setdefault("step", 0)
        else:
            state["step"] = 0
        with offload.in_memory(optimizer, partition.index, write=True):
            state.update({name: torch.zeros_like(partition.masters) for name in MOMENTS})


def step_count(optimizer, partition: Partition) -> float:
    """Updates that a partition has had: in its state (a tensor or a number), or in its group (apex)."""
    state = optimizer.optimizer.state[partition.masters]
    return float(state["step"] if "step" in state else partition.group["step"])


def set_step_count(optimizer, partition: Partition, count: float) -> None:
    state = optimizer.optimizer.state[partition.masters]
    holder = state if "step" in state else partition.group
    if torch.is_tensor(holder["step"]):
        holder["step"].fill_(count)
    else:
        holder["step"] = int(count)


def reset_state(optimizer, group_name: str) -> None:
    """Zero the moments and the step counter of one group: its update rule starts as if new (for the lazy adapters)."""
    for partition in of(optimizer):
        state = optimizer.optimizer.state[partition.masters]
        if partition.group["name"] == group_name and state:
            with offload.in_memory(optimizer, partition.index, write=True):
                for value in state.values():
                    if torch.is_tensor(value):
                        value.zero_()
            set_step_count(optimizer, partition, 0)
