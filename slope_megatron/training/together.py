"""What ranks must decide alike: one looks and all hear it, or all look; without ranks, this process alone."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class Agreed(ValueError):
    """A refusal that every rank raises, with the same words: they can leave the run in order."""


def on_first_rank(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0 only; its result reaches every rank, and so does what it meets.

    Raises:
        Agreed: with the words of its ValueError or OSError. Without ranks, that error itself.
    """
    if not dist.is_initialized():
        return function()
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise Agreed(outcome[1])
    return outcome[0]


def from_every_rank(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's value, by rank; of all ranks, or of a group."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one, the same on every rank; None: no rank has."""
    return next((found for found in from_every_rank(problem) if found), None)


def own_share(items: list) -> list:
    """Every item falls to one rank."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def agreed(function: Callable[[], Any]) -> Any:
    """Call `function` on every rank. A ValueError of one of them reaches all, which would wait for it.

    Raises:
        Agreed: of the kind, too, and with the words that the first rank with one met.
    """
    result, met = None, None
    try:
        result = function()
    except Agreed:  # the others raise it, too, at the same line
        raise
    except ValueError as error:
        met = (type(error), str(error))
    if first := next((found for found in from_every_rank(met) if found), None):
        kind, words = first
        # Some of Python's own, such as UnicodeDecodeError, cannot be made of words.
        if issubclass(Agreed, kind) or kind.__init__ is not ValueError.__init__:
            raise Agreed(words)
        raise type(kind.__name__, (Agreed, kind), {})(words)
    return result
