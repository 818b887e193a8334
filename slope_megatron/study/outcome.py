"""The row of a run, from the files that `slope pretrain` left in its folder."""

import math
from pathlib import Path

from slope_megatron.config.json_file import read_json
from slope_megatron.storage.metrics_file import read_metrics
from slope_megatron.study import rows
from slope_megatron.study.controls import average_parameters, sparse_share
from slope_megatron.study.rows import Row
from slope_megatron.study.runs import Run
from slope_megatron.training.telemetry.flops import flops_per_token
from slope_megatron.versions import versions

WAY_OUT = "remove the run's folder: it is trained again"


def done_row(run: Run, folder: Path, at_once: int) -> Row:
    """Of a run that trained all its steps; one whose last loss is not finite has diverged.

    Raises:
        ValueError: the run's summary is missing, damaged, of another step, or without a validation.
    """
    try:
        summary = read_json(folder / "summary.json", WAY_OUT, holds=("steps", "tokens", "val_loss", "state_bytes"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no summary.json though the run has ended; {WAY_OUT}") from None
    if summary["steps"] != run.config.train.steps:
        raise ValueError(f"{folder} ended at step {summary['steps']} of {run.config.train.steps}; {WAY_OUT}")
    if summary["val_loss"] is None:
        raise ValueError(f"{folder} validated nothing; {WAY_OUT}")
    if not math.isfinite(summary["val_loss"]):
        return row(run, folder, at_once, {**summary, "val_loss": None}, rows.DIVERGED)
    return row(run, folder, at_once, summary, rows.DONE)


def diverged_row(run: Run, folder: Path, at_once: int) -> Row:
    """Of a run that ended itself: its losses or gradients were not finite. That is a result."""
    return row(run, folder, at_once, {}, rows.DIVERGED)


def row(run: Run, folder: Path, at_once: int, summary: dict, outcome: str) -> Row:
    counts, sparse = flops_per_token(run.config, run.vocabulary), sparse_share(run.config)
    assert run.lr is not None, "a run that was trained has a learning rate"
    return Row(
        name=run.name,
        key=run.key,
        group=run.group,
        size=run.size,
        method=run.method,
        lr=run.lr,
        seed=run.seed,
        outcome=outcome,
        val_loss=summary.get("val_loss"),
        train_loss=last_loss(folder),
        tokens=summary.get("tokens", run.tokens),
        steps=summary.get("steps", run.config.train.steps),
        body_parameters=run.body_parameters,
        parameters=summary.get("parameters"),
        average_parameters=average_parameters(run.config, run.vocabulary),
        flops=run.tokens * counts.dense_equivalent,
        actual_flops=run.tokens * (sparse * counts.actual + (1.0 - sparse) * counts.dense_equivalent),
        state_bytes=most_state(summary) if summary else None,
        seconds=summary.get("train_seconds"),
        tokens_per_second=summary.get("tokens_per_second"),
        bad_steps=summary.get("bad_steps"),
        device=summary.get("device", ""),
        at_once=at_once,
        vocabulary=run.vocabulary,
        data=run.data,
        version=versions().get("slope-megatron", ""),
    )


def most_state(summary: dict) -> int:
    """Bytes of the form that holds most: the summary has those of the last one, and attempts those of all."""
    forms = (attempt.get("state_bytes", 0) for attempt in summary.get("attempts", ()))
    return max(sum(summary["state_bytes"]["model"].values()), *forms, 0)


def last_loss(folder: Path) -> float | None:
    """Of the last training step in the metrics file."""
    try:
        lines, _ = read_metrics(folder / "metrics.jsonl")
    except OSError:
        return None
    return next((line["loss"] for line in reversed(lines) if line.get("loss") is not None), None)


def last_words(folder: Path) -> str:
    """What a run that failed said of it: its last error, or where its log is."""
    log = folder.with_name(f"{folder.name}.log")
    try:
        said = log.read_text(errors="replace").splitlines()
    except OSError:
        return f"it left no log {log}"
    errors = [line for line in said if "error: " in line.lower()]
    return f"{errors[-1].removeprefix('slope: error: ')} (its log: {log})" if errors else f"see its log {log}"
