"""Lazy adapters under Megatron-LM's own loop and optimizer: unused until their step comes, fresh when they join.

Before that step Y = X (W^R)^T and the adapters have no gradients, but weight decay shrinks L. So when they join (SLoPe,
section 3.2) both factors are written anew, their fp32 copies too, and what Adam remembers of them is forgotten.
"""

import logging

import torch

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.pruned_linear import PrunedLinear

logger = logging.getLogger(__name__)


def enter_phase(chunks, optimizer, slope: SlopeConfig, *, step: int, steps: int, seed: int) -> None:
    """Bring the model into the phase of step `step` of `steps`, counted from 0.

    Args:
        chunks: the parts of the model on this rank, wrapped as they are trained.
        optimizer: Megatron's; None where nothing is trained.
    """
    from slope_megatron.models.fill import fill_adapters

    start = slope.adapter_start(steps)
    if start is None:
        return
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, PrunedLinear):
                module.adapters_active = step >= start
    if step == start and optimizer is not None:
        for chunk in chunks:
            restart(optimizer, fill_adapters(unwrapped(chunk), seed=seed))
        logger.info("step %d of %d: the adapters join", step, steps)


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model without Megatron's data parallelism and precision around it."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@torch.no_grad()
def restart(optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Fp32 copies from the parameters, and empty memory of them, in whichever of the chained optimizers has them."""
    shared_steps = False
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        states = part.optimizer.state
        for parameter in parameters:
            main = getattr(parameter, "main_param", None)
            if main is None:
                main = parameter
            elif main.shape == parameter.shape:
                main.copy_(parameter)
            elif parameter in part.model_param_gbuf_map:  # this rank's part, of the distributed optimizer
                here = part._get_model_param_range_map(parameter)["param"]
                main.copy_(parameter.view(-1)[here.start : here.end])
            # The distributed optimizer saves one step counter for all parameters, so it must stay one.
            one_counter = hasattr(part, "model_param_gbuf_map")
            for name, value in states.get(main, {}).items():
                if name != "step":
                    value.zero_()
                elif not one_counter:
                    states[main][name] = torch.zeros_like(value) if torch.is_tensor(value) else 0
        shared_steps |= hasattr(part, "model_param_gbuf_map") or any("step" in g for g in part.optimizer.param_groups)
    if shared_steps:
        logger.warning(
            "the optimizer counts steps for all parameters at once: Adam's averages of the adapters start from zero "
            "without bias correction"
        )
