"""The engine's state as sharded tensors: model, fp32 masters and moments by canonical name, however ZeRO cuts them."""

import dataclasses
from collections.abc import Iterator

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from slope_megatron.models.canonical import sharded_state_dict
from slope_megatron.models.layer_spec import pruned_modules
from slope_megatron.training.engine import Engine
from slope_megatron.training.optim.optimizer import model_parameters
from slope_megatron.training.together import from_every_rank
from slope_megatron.training.zero import offload, partitions
from slope_megatron.training.zero.partitions import MOMENTS

# What DeepSpeed's dynamic loss scaler remembers.
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def link_optimizer_state(engine: Engine) -> None:
    """Let DeepSpeed's per-parameter accessors see the optimizer state, creating it (zeros) before the first step.

    The two private names are DeepSpeed 0.19's: it links once and never again, and a load needs it again.
    """
    partitions.create_state(engine.optimizer)
    if not partitions.is_stage_3(engine.optimizer):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def sharded_engine_state(engine: Engine, *, filled: bool) -> dict:
    """Model and optimizer as sharded tensors; `filled` with the present state (to save) or empty (to load into).

    Collective over the data-parallel ranks when filled: each parameter's fp32 state is put together in turn, and goes
    to host memory at once.
    """
    with partitions.whole_shapes(engine.model):
        model_state = sharded_state_dict(engine.model)
    state = {"model": model_state, "fp32": {}, **{name: {} for name in MOMENTS}}
    for name, parameter in by_partition(engine):
        shape = partitions.shape_of(parameter)
        full = full_state(engine.optimizer, parameter) if filled else {}
        for kind in ("fp32", *MOMENTS):
            tensor = full[kind].detach().cpu() if filled else torch.empty(shape, dtype=torch.float32)
            state[kind][name] = make_sharded_optimizer_tensor(model_state[name], tensor, f"optimizer.{kind}")
        if partitions.is_cut(parameter):
            # The weight is its master rounded; nobody has it whole.
            weight = full["fp32"].detach().cpu() if filled else torch.empty(shape)
            model_state[name] = dataclasses.replace(model_state[name], data=weight.to(parameter.dtype))
    return state


def by_partition(engine: Engine, *, write: bool = False) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters, with the fp32 state of each there while it is looked at (or with `write`, changed)."""
    named = list(model_parameters(engine.model))
    if not partitions.is_stage_3(engine.optimizer):
        yield from named
        return
    names = {id(parameter): name for name, parameter in named}
    for index, group in enumerate(engine.optimizer.fp16_groups):
        with offload.in_memory(engine.optimizer, index, write=write):
            yield from ((names[id(parameter)], parameter) for parameter in group)


def full_state(optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Masters and moments of a whole parameter; collective."""
    if not partitions.is_stage_3(optimizer):
        moments = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        return {"fp32": safe_get_full_fp32_param(parameter), **moments}
    parts = partitions.stage_3_state(optimizer, parameter)
    # Offloaded state is on the CPU; the collective wants the parameter's device.
    return {kind: optimizer._fp32_state_allgather(parameter, part.to(parameter.device)) for kind, part in parts.items()}


def optimizer_steps(engine: Engine) -> dict[str, float]:
    """The optimizer's step counter of each parameter group (the adapters' starts when they join); all ranks call it.

    A pipeline stage may lack a group, so every rank's are put together.
    """
    parts = partitions.of(engine.optimizer)
    here = {part.group["name"]: partitions.step_count(engine.optimizer, part) for part in parts}
    return {name: step for steps in from_every_rank(here) for name, step in steps.items()}


def install_engine_state(engine: Engine, state: dict, steps: dict[str, float]) -> None:
    """Put loaded state into the model, the fp32 partitions and the moments."""
    named = dict(model_parameters(engine.model))
    cut = {name for name, parameter in named.items() if partitions.is_cut(parameter)}
    whole = {name: value for name, value in state["model"].items() if name not in cut}
    engine.model.load_state_dict(whole, strict=False)
    for name, parameter in by_partition(engine, write=True):
        if partitions.is_cut(parameter):
            partitions.write_cut(parameter, state["model"][name])
            for kind, part in partitions.stage_3_state(engine.optimizer, parameter).items():
                part.copy_(partitions.own_part(parameter, state[kind][name]))
        else:
            safe_set_full_fp32_param(parameter, state["fp32"][name])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[moment][name], moment)
    for partition in partitions.of(engine.optimizer):
        partitions.set_step_count(engine.optimizer, partition, steps[partition.group["name"]])
    if not partitions.is_stage_3(engine.optimizer):
        engine.optimizer.update_lp_params()
    for module in pruned_modules(engine.model):
        module.drop_operands()
        # Those that stage 3 has cut were written in parts.
        module.mark_present("weight")


def loss_scaler_state(engine: Engine) -> dict[str, float] | None:
    """The dynamic loss scale and its counters; None: the run has none."""
    if engine.dtype != torch.float16:
        return None
    fields = {name: getattr(engine.optimizer.loss_scaler, name) for name in SCALER_FIELDS}
    return {**fields, "skipped_steps": engine.skipped_steps}


def install_loss_scaler(engine: Engine, state: dict[str, float] | None) -> None:
    if state and engine.dtype == torch.float16:
        engine.skipped_steps = int(state["skipped_steps"])
        for name in SCALER_FIELDS:
            setattr(engine.optimizer.loss_scaler, name, state[name])
