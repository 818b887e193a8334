"""Plots of run folders."""

import json
import math
from pathlib import Path


def read_metrics(run: Path) -> list[dict]:
    """All complete lines of a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def curve(metrics: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    points = [(line["step"], line[key]) for line in metrics if key in line]
    return [step for step, _ in points], [value for _, value in points]


def plot_losses(runs: dict[str, Path], target: Path, *, adapter_start: int | None, unigram_entropy: float) -> None:
    """Training (thin) and validation (dots) losses of several runs, in nats per token.

    Args:
        runs: label -> run folder.
        adapter_start: the step at which adapters join, drawn as a line; None: no line.
        unigram_entropy: what a model that knows token frequencies only would reach, drawn as a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=130)
    for (label, run), colour in zip(runs.items(), ("tab:blue", "tab:orange", "tab:green"), strict=False):
        metrics = read_metrics(run)
        axes.plot(*curve(metrics, "loss"), color=colour, linewidth=0.9, alpha=0.6)
        steps, values = curve(metrics, "val_loss")
        axes.plot(steps, values, "o-", color=colour, markersize=4, label=f"{label}: validation {values[-1]:.3f}")
    axes.axhline(unigram_entropy, color="grey", linestyle=":", label=f"unigram entropy {unigram_entropy:.3f}")
    if adapter_start is not None:
        axes.axvline(adapter_start, color="tab:green", linestyle="--", linewidth=1, label="adapters join")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(top=math.ceil(unigram_entropy * 1.25))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)
