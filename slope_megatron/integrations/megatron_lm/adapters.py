"""Lazy adapters under Megatron-LM's own loop and optimizer: unused until their step comes, fresh when they join.

Before that step Y = X (W^R)^T and the adapters have no gradients, but weight decay shrinks L. So when they join (SLoPe,
section 3.2) both factors are written anew, their fp32 copies too, and what Adam remembers of them is forgotten. Its
count of their steps, by which it corrects its averages, is theirs only while a step is made: checkpoints of Megatron
hold one count for all parameters.
"""

import contextlib
import logging

import torch

from slope_megatron.config import SlopeConfig
from slope_megatron.models.init_weights import init_adapters
from slope_megatron.models.layer_spec import pruned_modules

logger = logging.getLogger(__name__)


def use_adapters(chunks, active: bool) -> None:
    """Whether the adapters of these parts of the model take part in the products from now on."""
    for chunk in chunks:
        for module in pruned_modules(chunk):
            module.adapters_active = active


@contextlib.contextmanager
def adapter_phase(chunks, optimizer, slope: SlopeConfig, *, step: int, steps: int, seed: int, whole: bool = True):
    """What surrounds the making of step `step` of `steps`, counted from 0.

    Args:
        optimizer: Megatron's, chained or not.
        whole: whether every rank has all weights before the step; else the forward gathers them.
    """
    start = slope.adapter_start(steps)
    if start is None or step < start:
        use_adapters(chunks, False)
        yield
        return
    use_adapters(chunks, True)
    models = [unwrapped(chunk) for chunk in chunks]
    # What Adam remembers of both factors of each adapter, on this rank.
    modules = (module for model in models for module in pruned_modules(model))
    factors = (factor for module in modules for factor in (module.adapter_l, module.adapter_r))
    held = [state for factor in factors for _, _, state in memories(optimizer, factor)]
    counters = [state["step"] for state in held if torch.is_tensor(state.get("step"))]
    if step == start:
        if not whole:
            # Adapters that are written anew must not be gathered once more, and what reads the model wants all of it.
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
        for model in models:
            restart(optimizer, init_adapters(model, seed=seed))
        logger.info("step %d of %d: the adapters join", step, steps)
        if held and not counters:
            logger.warning("the optimizer has one count of steps: Adam's averages of adapters begin uncorrected")
    common = [int(count) for count in counters]
    for count in counters:
        count.fill_(step - start)
    yield
    for count, before in zip(counters, common, strict=True):
        count.add_(before - (step - start))


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model without Megatron's data parallelism and precision around it."""
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    return chunk


def memories(optimizer, parameter: torch.nn.Parameter):
    """(Megatron's optimizer, the tensor that it steps for this parameter, Adam's state of it), where there is one."""
    main = getattr(parameter, "main_param", None)
    main = parameter if main is None else main
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if main in part.optimizer.state:
            yield part, main, part.optimizer.state[main]


@torch.no_grad()
def restart(optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Fp32 copies from the parameters, and averages of nothing."""
    for parameter in parameters:
        for part, main, state in memories(optimizer, parameter):
            if main.shape == parameter.shape:
                main.copy_(parameter)
            else:  # this rank's part, of the distributed optimizer
                here = part._get_model_param_range_map(parameter)["param"]
                main.copy_(parameter.view(-1)[here.start : here.end])
            for name, value in state.items():
                if name != "step":
                    value.zero_()
