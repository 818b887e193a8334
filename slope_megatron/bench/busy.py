"""How much of a time kernels are busy: the union of their intervals, as torch's profiler saw them."""

import json
import tempfile
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


def works(event: dict) -> bool:
    """Whether an event of a trace is work of the GPU itself; copies from and to the host run beside it."""
    kind = event.get("cat")
    return kind in ("kernel", "gpu_memset") or (kind == "gpu_memcpy" and "DtoD" in event["name"])


def busy(step: Callable[[], object], steps: int) -> float:
    """Milliseconds a step in which the GPU works; one step more warms up."""
    with profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=1, active=steps)) as profiler:
        step()
        torch.cuda.synchronize()
        profiler.step()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # Microseconds.
    return union((event["ts"], event["ts"] + event["dur"]) for event in events if works(event)) / 1e3 / steps
