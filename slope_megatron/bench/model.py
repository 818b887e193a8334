"""The visits of `slope bench model`: an engine is built, timed and freed before the next one is built."""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from slope_megatron.bench import engines
from slope_megatron.bench.busy import BOARD, Profile, busy
from slope_megatron.bench.engines import GIB, BuiltEngine
from slope_megatron.bench.lone_rank import rank_0_of
from slope_megatron.bench.progress import Clock
from slope_megatron.bench.work import ModelWork
from slope_megatron.config import Config, DataConfig, OptimizerConfig, ParallelConfig, SlopeConfig, TrainConfig
from slope_megatron.config.methods import BASELINES
from slope_megatron.models.shapes import own_rows
from slope_megatron.ops.autotune import timing
from slope_megatron.training import kernel_choices, parallel
from slope_megatron.training.teardown import clear
from slope_megatron.training.telemetry import accounting, flops

logger = logging.getLogger(__name__)
# None of the trainer's modes: `bench.dense_float8`.
DENSE_FLOAT8 = "dense-fp8"
# `--modes` -> what `--slope-*` flags such a run has.
SLOPE: dict[str, dict] = {
    "dense": {"enabled": False},
    DENSE_FLOAT8: {"enabled": False},
    "paper": {"mode": "paper"},
    "full": {"mode": "full"},
    "fp8": {"fp8": "current"},
    **{method: {"method": method} for method in BASELINES},
}


def config_of(slope: SlopeConfig, work: ModelWork) -> Config:
    """What `slope pretrain` would be told; all else is its default.

    A lone rank of several is captured where its group would not be unasked: it has no collectives.

    Raises:
        ValueError: what it refuses.
    """
    alone = work.shard_of > 1 and work.cuda_graphs == "auto" and torch.cuda.is_available()
    return Config(
        slope=slope,
        model=work.model,
        parallel=ParallelConfig(tensor_parallel=work.shard_of, sequence_parallel=work.shard_of > 1),
        data=DataConfig(
            data="none",
            seq_length=work.sequence,
            micro_batch_size=work.micro_batch,
            global_batch_size=work.micro_batch * work.micro_batches,
        ),
        optimizer=OptimizerConfig(lr=1e-5, min_lr=1e-6),
        train=TrainConfig(out="none", cuda_graphs="on" if alone else work.cuda_graphs),
    )


def configs(modes: list[str], work: ModelWork, clock: Clock) -> dict[str, Config]:
    """Of each mode that can be timed; the log says which cannot."""
    found = {}
    for mode in modes:
        if mode == DENSE_FLOAT8 and work.shard_of > 1:
            clock.say(f"{mode} is left out: it is made for whole linears, without --shard-of")
            continue
        slope = SlopeConfig(**SLOPE[mode])
        if slope.packed:
            slope = dataclasses.replace(slope, adapter_rank=work.adapter_rank, lazy_fraction=1.0)
        found[mode] = config_of(slope, work)
    return found


def visits(modes: list[str], work: ModelWork, clock: Clock, failed: list[str]) -> Iterator[dict]:
    """The row of each visit, with its "kernels"; none if it does not fit the GPU.

    Args:
        failed: gets the modes that ended in another error.
    Raises:
        ValueError: none of the modes can be timed.
    """
    wanted = configs(modes, work, clock)
    if not wanted:
        raise ValueError(f"--modes is {' '.join(modes)}: none of them can be timed with --shard-of; add one, as paper")
    order = [(mode, 1) for mode in wanted] + [(mode, 2) for mode in reversed(wanted)]
    labels = {f"{mode}, visit {number} of 2": (mode, number) for mode, number in order}
    too_large = set()
    with rank_0_of(work.shard_of):
        parallel.initialize(next(iter(wanted.values())))
        kernel_choices.share(Path(os.devnull), resumed=False)
        for label in clock.within(list(labels)):
            mode, number = labels[label]
            if mode in too_large:
                continue
            row = fitting(mode, wanted[mode], work, clock, failed)
            if row is None:
                too_large.add(mode)
                # Now that the error is gone, and with it the frames that held the engine.
                clear()
                continue
            yield {"model": work.name, "mode": mode, "visit": number} | row
        parallel.finish()


def fitting(mode: str, config: Config, work: ModelWork, clock: Clock, failed: list[str]) -> dict | None:
    """`visit`; None if the GPU has too little memory, or if something fails: the other modes go on."""
    needed, there = engines.planned_bytes(config), engines.device_bytes()
    if there and needed > there:
        said = f"{needed / GIB:.1f} GiB are planned and the GPU has {there / GIB:.1f}"
        clock.say(f"this mode does not fit: {said}. Give fewer --layers, or other --modes")
        return None
    try:
        return visit(config, work, clock, float8=mode == DENSE_FLOAT8)
    except torch.OutOfMemoryError as error:
        clock.say(f"this mode does not fit: {str(error).splitlines()[0]} Give fewer --layers, or other --modes")
    except RuntimeError as error:
        clock.say(f"this mode failed: {error}")
        failed.append(mode)
    return None


def visit(config: Config, work: ModelWork, clock: Clock, *, float8: bool) -> dict:
    """Build, time and free one engine.

    Args:
        float8: a dense one, whose linears multiply in e4m3.
    """
    started = time.perf_counter()
    built = BuiltEngine(config, torch.bfloat16 if torch.cuda.is_available() else torch.float32, float8)
    try:
        row = measured(built, work, started)
    except Exception:
        built.let_go()
        raise
    kept = built.free()
    left = engines.allocated() - built.started_with
    clock.say(f"freed; {left / 2**20:.1f} MiB stay allocated{f': {kept}' if kept else ''}")
    return row | {"left_mib": left / 2**20 if torch.cuda.is_available() else ""}


def profiled(built: BuiltEngine, work: ModelWork) -> Profile | None:
    """What the GPU does in a step; None: not asked for, or the profiler fails."""
    if not work.profiled:
        return None
    try:
        return busy(built.step, work.profiled)
    except (RuntimeError, OSError) as error:
        logger.warning("the profiler failed: %s", error)
        return None


def measured(built: BuiltEngine, work: ModelWork, started: float) -> dict:
    """The row of one engine, without what it is called."""
    config = built.engine.config
    built.step()
    torch.cuda.synchronize()
    start_s = time.perf_counter() - started
    # From here on: what a replayed step takes is allocated when it is captured, and not again.
    engines.reset_peak()
    for _ in range(work.warmup - 1):
        built.step()
    torch.cuda.synchronize()
    state = engines.allocated()
    parts = accounting.local_bytes(built.engine)
    samples = []
    for _ in range(work.steps):
        begun = time.perf_counter()
        result = built.step()
        # Its end waits for the gradients' norm; what the GPU still does then counts in the next step, as in training.
        samples.append(1e3 * (time.perf_counter() - begun))
    if result.skipped:
        raise RuntimeError(f"a loss of {result.loss} or a gradient is not finite: what was timed is not training")
    peak = engines.peak_allocated()
    profile = profiled(built, work)
    tokens_per_second = work.sequence * work.micro_batch * work.micro_batches / timing.median(samples) * 1e3
    counts = flops.flops_per_token(config, own_rows(config.model), adapters=config.adapter_start == 0)
    speed = flops.speed(counts, tokens_per_second, work.shard_of, flops.peak_tflops(config))
    return {
        "layers": config.model.num_layers,
        "shard_of": work.shard_of,
        "sequence": work.sequence,
        "micro_batch": work.micro_batch,
        "micro_batches": work.micro_batches,
        "adapter_rank": config.slope.rank if config.slope.packed else 0,
        "parameters": accounting.parameter_count(built.engine),
        "steps": work.steps,
        "launch": "graph" if built.replays() else "eager",
        "loss": result.loss,
        "step_ms": timing.median(samples),
        "spread": timing.spread(samples),
        "tokens_per_second": tokens_per_second,
        "mfu": speed.get("mfu", ""),
        "mfu_actual": speed.get("mfu_actual", ""),
        "busy_ms": profile.busy_ms if profile else "",
        "busy_share": profile.busy_ms / timing.median(samples) if profile else "",
        **{name: profile.board.get(name, "") if profile else "" for name in BOARD},
        "linears_gib": sum(parts["sparse_layers"].values()) / GIB,
        "counted_gib": sum(parts["model"].values()) / GIB,
        "state_gib": state / GIB or "",
        "peak_gib": peak / GIB or "",
        # Of the rounded weights of dense e4m3 `slope plan` knows nothing.
        "planned_gib": "" if built.rounded else engines.planned_bytes(config) / GIB,
        "start_s": start_s,
        "kernels": profile.kernels if profile else {},
    }
