"""The engine's state as sharded tensors: model, fp32 masters and moments by canonical name, however ZeRO cuts them."""

import dataclasses

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from slope_megatron.models.canonical import sharded_state_dict
from slope_megatron.models.fill import pruned_modules
from slope_megatron.training import zero
from slope_megatron.training.engine import Engine
from slope_megatron.training.optimizer import model_parameters
from slope_megatron.training.zero import MOMENTS

# What DeepSpeed's dynamic loss scaler remembers.
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def link_optimizer_state(engine: Engine) -> None:
    """Let DeepSpeed's per-parameter accessors see the optimizer state, creating it (zeros) before the first step.

    The two private names are DeepSpeed 0.19's: it links once and never again, and a load needs it again.
    """
    zero.create_state(engine.optimizer)
    if not zero.is_stage_3(engine.optimizer):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def sharded_engine_state(engine: Engine, *, filled: bool) -> dict:
    """Model and optimizer as sharded tensors; `filled` with the present state (to save) or empty (to load into).

    Collective over the data-parallel ranks when filled: each parameter's fp32 state is put together in turn, and goes
    to host memory at once.
    """
    with zero.whole_shapes(engine.model):
        model_state = sharded_state_dict(engine.model)
    state = {"model": model_state, "fp32": {}, **{name: {} for name in MOMENTS}}
    for name, parameter in model_parameters(engine.model):
        shape = zero.shape_of(parameter)
        full = {}
        if filled:
            full["fp32"] = safe_get_full_fp32_param(parameter)
            full.update({moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS})
        for kind in ("fp32", *MOMENTS):
            tensor = full[kind].detach().cpu() if filled else torch.empty(shape, dtype=torch.float32)
            state[kind][name] = make_sharded_optimizer_tensor(model_state[name], tensor, f"optimizer.{kind}")
        if hasattr(parameter, "ds_shape"):
            # The weight is its master rounded; nobody has it whole.
            weight = full["fp32"].detach().cpu() if filled else torch.empty(shape)
            model_state[name] = dataclasses.replace(model_state[name], data=weight.to(parameter.dtype))
    return state


def optimizer_steps(engine: Engine) -> dict[str, float]:
    """The optimizer's step counter of each parameter group (the adapters' starts when they join); all ranks call it.

    A pipeline stage may lack a group, so every rank's are put together.
    """
    parts = zero.partitions(engine.optimizer)
    here = {part.group["name"]: zero.step_count(engine.optimizer, part) for part in parts}
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return {name: step for steps in everywhere for name, step in steps.items()}


def install_engine_state(engine: Engine, state: dict, steps: dict[str, float]) -> None:
    """Put loaded state into the model, the fp32 partitions and the moments."""
    named = dict(model_parameters(engine.model))
    cut = {name for name, parameter in named.items() if hasattr(parameter, "ds_shape")}
    whole = {name: value for name, value in state["model"].items() if name not in cut}
    engine.model.load_state_dict(whole, strict=False)
    for name, parameter in named.items():
        values = {moment: state[moment][name] for moment in MOMENTS}
        if name in cut:
            zero.write_cut(parameter, state["model"][name])
            safe_set_local_fp32_param(parameter, zero.own_part(parameter, state["fp32"][name]))
            for moment, value in values.items():
                safe_set_local_optimizer_state(parameter, zero.own_part(parameter, value), moment)
        else:
            safe_set_full_fp32_param(parameter, state["fp32"][name])
            for moment, value in values.items():
                safe_set_full_optimizer_state(parameter, value, moment)
    for part in zero.partitions(engine.optimizer):
        zero.set_step_count(engine.optimizer, part, steps[part.group["name"]])
    if not zero.is_stage_3(engine.optimizer):
        engine.optimizer.update_lp_params()
    for module in pruned_modules(engine.model):
        module.drop_operands()
        module.initialized = True


def loss_scaler_state(engine: Engine) -> dict[str, float] | None:
    """The dynamic loss scale and its counters; None: the run has none."""
    if engine.dtype != torch.float16:
        return None
    fields = {name: getattr(engine.optimizer.loss_scaler, name) for name in SCALER_FIELDS}
    return {**fields, "skipped_steps": engine.skipped_steps}


def install_loss_scaler(engine: Engine, state: dict[str, float] | None) -> None:
    if state and engine.dtype == torch.float16:
        engine.skipped_steps = state["skipped_steps"]
        for name in SCALER_FIELDS:
            setattr(engine.optimizer.loss_scaler, name, state[name])
