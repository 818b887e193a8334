"""The engine's state as sharded tensors: model, fp32 masters and moments by canonical name, however ZeRO cuts them."""

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from slope_megatron.models.canonical import sharded_state_dict
from slope_megatron.models.fill import sparse_modules
from slope_megatron.training.engine import Engine
from slope_megatron.training.optimizer import model_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


def link_optimizer_state(engine: Engine) -> None:
    """Let DeepSpeed's per-parameter accessors see the optimizer state, creating it (zeros) before the first step.

    The two private names are DeepSpeed 0.19's: it links once and never again, and a load needs it again.
    """
    base = engine.optimizer.optimizer
    for group in base.param_groups:
        for partition in group["params"]:
            state = base.state[partition]
            if not state:
                state["step"] = torch.tensor(0.0)
                state.update({name: torch.zeros_like(partition) for name in MOMENTS})
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def sharded_engine_state(engine: Engine, *, filled: bool) -> dict:
    """Model and optimizer as sharded tensors; `filled` with the present state (to save) or empty (to load into).

    Collective over the data-parallel ranks when filled: each parameter's fp32 state is put together in turn.
    """
    model_state = sharded_state_dict(engine.model)
    state = {"model": model_state, "fp32": {}, **{name: {} for name in MOMENTS}}
    for name, parameter in model_parameters(engine.model):
        full = {}
        if filled:
            full["fp32"] = safe_get_full_fp32_param(parameter)
            full.update({moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS})
        for kind in ("fp32", *MOMENTS):
            tensor = full[kind].detach() if filled else torch.empty(parameter.shape, dtype=torch.float32)
            state[kind][name] = make_sharded_optimizer_tensor(model_state[name], tensor, f"optimizer.{kind}")
    return state


def optimizer_steps(engine: Engine) -> dict[str, float]:
    """Adam's step counter of each parameter group (the adapters' starts when they join); all ranks call it.

    A pipeline stage may lack a group, so every rank's are put together.
    """
    base = engine.optimizer.optimizer
    here = {group["name"]: float(base.state[group["params"][0]]["step"]) for group in base.param_groups}
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return {name: step for steps in everywhere for name, step in steps.items()}


def install_engine_state(engine: Engine, state: dict, steps: dict[str, float]) -> None:
    """Put loaded state into the model, the fp32 partitions and the moments."""
    engine.model.load_state_dict(state["model"], strict=False)
    for name, parameter in model_parameters(engine.model):
        safe_set_full_fp32_param(parameter, state["fp32"][name])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[moment][name], moment)
    base = engine.optimizer.optimizer
    for group in base.param_groups:
        for partition in group["params"]:
            base.state[partition]["step"].fill_(steps[group["name"]])
    engine.optimizer.update_lp_params()
    for module in sparse_modules(engine.model):
        module.drop_operands()
