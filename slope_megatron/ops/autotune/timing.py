"""Times of GPU work, candidates in turn within one run, so that a clock that changes changes for all."""

import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name")


def interleaved(functions: Mapping[Name, Callable[[], object]], *, rounds: int, calls: int) -> dict[Name, list[float]]:
    """Milliseconds of one call: `rounds` samples for each function, each the mean over `calls` calls in a row."""
    for function in functions.values():
        function()
    marks: dict[Name, list] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                function()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / calls for start, end in pairs] for name, pairs in marks.items()}


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def spread(samples: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


def calls_for(milliseconds: float, target: float = 2.0, most: int = 20) -> int:
    """How many calls make up `target` ms: short kernels are timed several at a time."""
    return max(1, min(most, round(target / max(milliseconds, 1e-3))))
