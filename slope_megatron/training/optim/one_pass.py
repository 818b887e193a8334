"""AdamW over ZeRO-1's flat groups in one pass over memory: clipping, moments, masters and 16-bit weights.

torch's fused AdamW, with clipping before and rounding after, passes over a group three times: 46 bytes an element are
moved where 30 do. State is torch's own, `step`, `exp_avg` and `exp_avg_sq` in fp32, so checkpoints are the same.
"""

import torch

from slope_megatron.ops.custom_ops.products import HAS_TRITON
from slope_megatron.ops.update import adamw_


def applies(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is AdamW by torch on a GPU: not apex's, not LAMB, nothing offloaded.

    Nor one with hooks, such as the baselines' decay, which want to see clipped gradients before they are used.
    """
    fused = type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return fused and not hooked and HAS_TRITON


def update(
    optimizer: torch.optim.Optimizer,
    masters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    weights: list[torch.Tensor],
    coefficient: float,
) -> None:
    """One step of `optimizer`, whose groups have one master `[P]` each.

    Args:
        gradients: fp32 `[P]` of each group, before clipping.
        weights: get the masters, rounded.
        coefficient: that clipping multiplies gradients by.
    """
    for group, master, gradient, weight in zip(optimizer.param_groups, masters, gradients, weights, strict=True):
        state = optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        how = {"lr": group["lr"], "decay": group["weight_decay"], "eps": group["eps"], "beta1": beta1, "beta2": beta2}
        adamw_(master, *moments, weight, gradient, state["step"], coefficient=coefficient, **how)
