"""The one way to a choice: found in the table, or measured now, outside what torch.compile and CUDA graphs see."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from slope_megatron.ops import choices
from slope_megatron.ops.choices import Key, OneDecision

Function = TypeVar("Function", bound=Callable)


def uncompiled(function: Function) -> Function:
    """`function` as torch.compile leaves it alone: measuring and building buffers are not for it to trace."""
    # The decorator form would import the compiler with this module.
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def resolve(
    key: Key,
    device: torch.device,
    measure: Callable[[], OneDecision],
    *,
    on_cpu: OneDecision,
    fits: Callable[[OneDecision], bool] = lambda _: True,
) -> OneDecision:
    """The choice for `key`, measured now if need be. Call it through `uncompiled` where a product may be traced.

    Args:
        on_cpu: the choice of a CPU, where nothing is measured.
        fits: whether an earlier choice will do; one that does not is made anew.
    Raises:
        RuntimeError: it would have to be made while a CUDA graph is captured.
    """
    if device.type == "cpu":
        # The same on every rank: there is nothing to agree on.
        decision = choices.find(key)
        if decision is None or not fits(decision):
            decision = on_cpu
            choices.record(key, decision)
        return decision
    refuse_while_capturing(key, device)
    return choices.decide(key, measure, fits)


def refuse_while_capturing(key: Key, device: torch.device) -> None:
    """Measuring, and bringing buffers into another form, are not for a CUDA graph to replay.

    Raises:
        RuntimeError: a graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{key} has not run yet on this weight and a CUDA graph is being captured: run it once before capturing"
        )
