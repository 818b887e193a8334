"""Parameter groups, the DeepSpeed configuration, and what ZeRO keeps for a group."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.config import Config
from slope_megatron.models.layer_spec import twin_weights

SPARSE, DENSE, NO_DECAY, ADAPTERS = "sparse", "dense", "no_decay", "adapters"


def parameter_groups(model: torch.nn.Module, config: Config) -> list[dict]:
    """Named groups: packed values, other matrices, biases and norms (no decay), adapters. Empty groups are left out."""
    # The dense twin groups the same weights, so that bytes and learning rates compare like with like.
    sparse = {id(weight) for weight in twin_weights(model, config.slope)}
    members: dict[str, list] = {SPARSE: [], DENSE: [], NO_DECAY: [], ADAPTERS: []}
    for name, parameter in model.named_parameters():
        if id(parameter) in sparse:
            members[SPARSE].append(parameter)
        elif name.endswith((".adapter_l", ".adapter_r")):
            members[ADAPTERS].append(parameter)
        elif parameter.dim() < 2:
            members[NO_DECAY].append(parameter)
        else:
            members[DENSE].append(parameter)
    fill_empty_groups(model, members)
    decay = config.optimizer.weight_decay
    return [
        {"name": name, "params": parameters, "weight_decay": 0.0 if name == NO_DECAY else decay}
        for name, parameters in members.items()
        if parameters
    ]


def fill_empty_groups(model: torch.nn.Module, members: dict[str, list]) -> None:
    """Give this stage a placeholder in each group that only other pipeline stages have.

    DeepSpeed sums the gradient norm over the model-parallel ranks group by group: with other groups on each stage (a
    middle one has no embedding) the ranks would wait for each other for ever.
    """
    everywhere: list = [None] * parallel_state.get_model_parallel_group().size()
    here = [name for name, parameters in members.items() if parameters]
    dist.all_gather_object(everywhere, here, group=parallel_state.get_model_parallel_group())
    for name in sorted({name for names in everywhere for name in names} - set(here)):
        like = next(model.parameters())
        placeholder = torch.nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
        placeholder.is_placeholder = True
        # The block's own parameters, of which it has none, are in no checkpoint.
        model.decoder.register_parameter(f"placeholder_{name}", placeholder)
        members[name].append(placeholder)


def model_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """`named_parameters` without the placeholders."""
    named = model.named_parameters()
    return ((name, parameter) for name, parameter in named if not getattr(parameter, "is_placeholder", False))


def build_adamw(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over the named groups; DeepSpeed puts its fp32 partitions in their place."""
    settings = config.optimizer
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        # The default form on GPUs keeps temporaries of the size of the parameters.
        fused=torch.cuda.is_available(),
    )


def deepspeed_config(config: Config, dtype: torch.dtype, data_parallel: int) -> dict:
    """DeepSpeed's JSON for ZeRO-1, from this run's configuration."""
    settings = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": config.data.micro_batches(data_parallel),
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": {"stage": 1, "overlap_comm": False, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if dtype == torch.bfloat16:
        # fp32 accumulation over micro-batches; this path never reaches DeepSpeed's own end-of-backward hook.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def reset_state(optimizer, group_name: str) -> None:
    """Zero the moments and the step counter of one group: its Adam starts as if new (for the lazy adapters)."""
    base = optimizer.optimizer
    for group in base.param_groups:
        if group["name"] == group_name:
            for partition in group["params"]:
                for value in base.state[partition].values():
                    value.zero_()
