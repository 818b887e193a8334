"""Where every choice comes from: found in the table, or measured, outside torch.compile and CUDA graphs."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

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
    check: Callable[[], None] = lambda: None,
) -> OneDecision:
    """The choice for `key`, measured now if need be; what torch.compile traces of this is a look into the table.

    Args:
        on_cpu: the choice of a CPU, where nothing is measured.
        fits: whether an earlier choice will do; one that does not is made anew.
        check: called on every rank before any measures, to raise what all of them refuse.
    Raises:
        RuntimeError: it would have to be made while a CUDA graph is captured.
    """
    found = choices.find(key)
    if found is not None and fits(found):
        return found
    return uncompiled(_choose_now)(key, device, measure, on_cpu, check)


def _choose_now(key, device, measure, on_cpu, check) -> Any:
    if device.type == "cpu":
        # The same on every rank: there is nothing to agree on.
        choices.record(key, on_cpu)
        return on_cpu
    check()
    refuse_while_capturing(key, device)
    # Only the rank that measures draws: its dropout masks would differ from the others', and from a later start's.
    with torch.random.fork_rng([device]):
        return choices.decide(key, measure)


def refuse_while_capturing(key: Key, device: torch.device) -> None:
    """Measuring, and rewriting buffers in another layout, are not for a CUDA graph to replay.

    Raises:
        RuntimeError: a graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{key} has not run yet on this weight and a CUDA graph is being captured: run it once before capturing"
        )
