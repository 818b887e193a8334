"""How much of a time kernels are busy: the union of their intervals, as torch's profiler saw them."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what at least one of the (start, end) covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def busy(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Milliseconds a step in which a kernel runs, and their share of the steps' time; one step more warms up."""
    with profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=1, active=steps)) as profiler:
        step()
        torch.cuda.synchronize()
        profiler.step()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        taken = 1e3 * (time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # Microseconds.
    kernels = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "kernel"]
    milliseconds = union(kernels) / 1e3
    return milliseconds / steps, milliseconds / taken
