"""A run in figures, at its end: what goes into summary.json."""

import statistics
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.ops.backend import choose
from slope_megatron.training.checkpoint import attempts
from slope_megatron.training.telemetry import accounting, flops

if TYPE_CHECKING:
    from slope_megatron.training.loop import Run


def of(run: "Run", wall_seconds: float) -> dict:
    """All of it; seconds, tokens/s and counts of steps are those of all attempts, the rest of the model as it ends."""
    engine, config = run.engine, run.config
    if run.val_loss is None and run.validation is not None:
        run.validate(engine.steps_done)
    run.attempt["wall_seconds"] = wall_seconds
    return {
        "steps": engine.steps_done,
        "stopped_early": run.stopped and engine.steps_done < config.train.steps,
        "unsaved": run.saver.failure,
        "tokens": engine.steps_done * run.tokens,
        "val_loss": run.val_loss,
        "unigram_entropy": unigram_entropy(run),
        "parameters": accounting.parameter_count(engine),
        "speed": speed(run),
        "device": accounting.device_name(engine),
        "peak_memory_bytes": accounting.peak_memory_bytes(engine),
        **attempts.totals(engine.attempts, run.tokens),
        "state_bytes": accounting.state_bytes(engine),
        "state_bytes_per_rank": accounting.state_bytes_per_rank(engine),
        "zero_stage": config.parallel.zero_stage,
        "double_pruning": accounting.double_pruning(engine),
        "ranks": dist.get_world_size(),
        "pipeline_parallel": config.parallel.pipeline_parallel,
        "tensor_parallel": config.parallel.tensor_parallel,
        "data_parallel": parallel_state.get_data_parallel_world_size(),
        "backend": choose(config.slope.backend) if config.slope.packed else "dense",
    }


def speed(run: "Run") -> dict[str, float] | None:
    """Of the median step here, which neither compiling nor searching kernels distorts; MFU where the peak is known.

    Operations are counted without adapters, which few steps have.
    """
    if not run.step_seconds:
        return None
    tokens_per_second = run.tokens / statistics.median(run.step_seconds)
    counts = flops.flops_per_token(run.config, run.vocabulary)
    found = flops.speed(counts, tokens_per_second, dist.get_world_size(), run.peak)
    return {"tokens_per_second": tokens_per_second, **found}


def unigram_entropy(run: "Run") -> float | None:
    """What knowing the frequencies of the validated tokens, and nothing else, would reach: nats per token."""
    if run.validation is None:
        return None
    counts = torch.zeros(run.vocabulary, dtype=torch.int64, device=run.engine.device)
    for batch in run.validation:
        counted = batch["labels"][batch["loss_mask"] > 0].to(counts.device)
        counts += torch.bincount(counted, minlength=run.vocabulary)
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return entropy(counts)


def entropy(counts: torch.Tensor) -> float:
    """Entropy of a distribution given by counts, in nats."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())
