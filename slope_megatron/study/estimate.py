"""How long runs will take, from rows that tell how fast others were on this kind of device; else from a stated rate."""

import statistics
from collections.abc import Callable, Sequence

from slope_megatron.study.rows import DONE, Row
from slope_megatron.study.runs import Run

# Until a run takes its first step: frameworks are imported, kernels chosen. Assumed.
STARTING_SECONDS = 30.0
# Of a small model on a GPU and on a CPU, runs that share it added up, counted as dense. Assumed.
ASSUMED_FLOPS = {"cuda": 100e12, "cpu": 20e9}


def flops_per_second(run: Run, rows: Sequence[Row], device: str, assumed: float) -> float:
    """Of a whole device, at the rate of the rows that are most like this run: method and size, method, or any."""
    timed = [row for row in rows if row.outcome == DONE and row.seconds and row.device == device]
    alike: tuple[Callable[[Row], bool], ...] = (
        lambda row: (row.method, row.size) == (run.method, run.size),
        lambda row: row.method == run.method,
        lambda row: True,
    )
    for is_alike in alike:
        rates = [row.flops / row.seconds * row.at_once for row in timed if row.seconds and is_alike(row)]
        if rates:
            return statistics.median(rates)
    return assumed


def minutes(runs: Sequence[Run], rows: Sequence[Row], device: str, assumed: float, slots: int, at_once: int) -> float:
    """Of all runs on all devices: what several runs on one take from each other, they take from no other device.

    Args:
        device: as rows name it.
        slots: runs at once, in all; `at_once` of them share a device.
    """
    computing = sum(run.flops / flops_per_second(run, rows, device, assumed) for run in runs)
    return (computing / (slots / at_once) + STARTING_SECONDS * len(runs) / slots) / 60.0


def flops(tflops: float | None) -> float:
    """FLOP/s of a device that no row tells of: what was given in TFLOP/s, or a guess."""
    import torch

    return ASSUMED_FLOPS["cuda" if torch.cuda.is_available() else "cpu"] if tflops is None else tflops * 1e12


def duration(minutes: float) -> str:
    """In the unit that people would name."""
    if minutes < 120:
        return f"{minutes:.0f} minutes"
    hours = minutes / 60
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
