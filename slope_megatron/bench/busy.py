"""What the GPU does in a step, as torch's profiler saw it: its kernels, and the union of their intervals."""

import dataclasses
import json
import statistics
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


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the GPU does in a step.

    Attributes:
        busy_ms: time of a step in which it works.
        kernels: name -> (ms, launches) of a step; times of kernels that overlap count in each.
        board: what NVML says of the GPU at the end of the steps, by the names in `BOARD`; what it does not say is
            missing.
    """

    busy_ms: float
    kernels: dict[str, tuple[float, float]]
    board: dict[str, float]


# Clock of the multiprocessors, power and temperature; torch gives power in mW.
BOARD: dict[str, Callable[[], float]] = {
    "clock_mhz": lambda: float(torch.cuda.clock_rate()),
    "watts": lambda: torch.cuda.power_draw() / 1e3,
    "celsius": lambda: float(torch.cuda.temperature()),
}


def board() -> dict[str, float]:
    found = {}
    for name, ask in BOARD.items():
        try:
            found[name] = ask()
        except Exception:  # NVML has many, none of which is worth a benchmark
            continue
    return found


def of_events(events: Iterable[dict], steps: int, boards: list[dict[str, float]]) -> Profile:
    """The profile of a trace of so many steps; its times are microseconds."""
    work = [event for event in events if works(event)]
    kernels: dict[str, tuple[float, float]] = {}
    for event in work:
        spent, launches = kernels.get(event["name"], (0.0, 0.0))
        kernels[event["name"]] = (spent + event["dur"] / 1e3 / steps, launches + 1 / steps)
    busy_ms = union((event["ts"], event["ts"] + event["dur"]) for event in work) / 1e3 / steps
    known = {name: [said[name] for said in boards if name in said] for name in BOARD}
    return Profile(busy_ms, kernels, {name: statistics.median(values) for name, values in known.items() if values})


def busy(step: Callable[[], object], steps: int) -> Profile:
    """Profile some steps; one step more warms up."""
    boards = []
    with profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=1, active=steps)) as profiler:
        step()
        torch.cuda.synchronize()
        profiler.step()
        for _ in range(steps):
            step()
            boards.append(board())
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return of_events(events, steps, boards)
