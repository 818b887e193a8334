"""Plots of run folders. Runs differ by colour, mark and line; colours also by brightness, for print in greyscale."""

import os
from pathlib import Path

# Okabe and Ito's colours, dark and light in turn; keywords of matplotlib's `plot`.
COLOURS = ("#0072b2", "#e69f00", "#000000", "#56b4e9", "#d55e00", "#cc79a7", "#009e73", "#b0b0b0")
STYLES = [
    {"color": colour, "marker": mark, "linestyle": line}
    for colour, mark, line in zip(COLOURS, "os^DvPX*", 4 * ("-", "--"), strict=True)
]
BYTE_COLOURS = {"weights": "#1b3a5c", "patterns": "#d55e00", "gradients": "#5aa0cf", "optimizer": "#cfe3f1"}
MIB = 2**20


def save(figure, target: Path) -> None:
    """Replace a picture by the finished one; a link is followed."""
    target = Path(os.path.realpath(target))
    partial = target.with_name(f"{target.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, target)


def curve(metrics: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; those that were not finite are null in the file, and left out."""
    points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_runs(records: list, target: Path) -> None:
    """Runs side by side: losses by step; tokens/s and measured bytes, where they are known.

    Args:
        records: with `label`, `metrics` and `summary` (`run_report.RunRecord`).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {record.label: STYLES[index % len(STYLES)] for index, record in enumerate(records)}
    height = max(4.8, 1.6 + 0.8 * len(records))
    figure, (losses, speed, memory) = plt.subplots(
        1, 3, figsize=(14, height), dpi=120, gridspec_kw={"width_ratios": (2.2, 1, 1)}, layout="constrained"
    )
    draw_losses(losses, records, styles)
    draw_speed(speed, records, styles)
    draw_bytes(memory, records)
    save(figure, target)
    plt.close(figure)


def draw_losses(axes, records, styles) -> None:
    """Training thin, validation as dots. The first steps' high losses may leave the picture."""
    finals = []
    for record in records:
        steps, values = curve(record.metrics, "loss")
        style = styles[record.label]
        axes.plot(steps, values, **{**style, "marker": ""}, linewidth=0.8, alpha=0.6)
        steps, values = curve(record.metrics, "val_loss")
        label = f"{record.label}: validation {values[-1]:.3f}" if values else f"{record.label}: no validation yet"
        axes.plot(steps, values, **style, markersize=4.5, label=label)
        finals += values
        # What training reached once validation began stays in the picture as well.
        training = zip(*curve(record.metrics, "loss"), strict=True)
        finals += [loss for step, loss in training if steps and step >= steps[0]]
    if finals:
        low, high = min(finals), max(finals)
        margin = max(0.02 * low, 0.1 * (high - low))
        axes.set_ylim(max(0.0, low - margin), high + margin)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("loss: training (thin) and validation (marks)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=9)


def draw_speed(axes, records, styles) -> None:
    """Mean tokens/s of the whole run; the number is at the bar."""
    labels = [record.label for record in records]
    values = [record.summary.get("tokens_per_second") or 0.0 for record in records]
    bars = axes.barh(labels, values, color=[styles[label]["color"] for label in labels])
    axes.bar_label(bars, [f"{value:,.0f}" if value else "unknown" for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values, default=0.0) * 1.3 or 1.0)
    axes.set_title("speed, all ranks (tokens/s)")
    axes.grid(axis="x", alpha=0.3)


def draw_bytes(axes, records) -> None:
    """Measured bytes of the whole model's state, stacked by kind; backend operands are left out: they depend on it."""
    known = [record for record in records if record.summary.get("state_bytes")]
    labels = [record.label for record in known]
    left = [0.0] * len(known)
    for kind, colour in BYTE_COLOURS.items():
        sizes = [record.summary["state_bytes"]["model"].get(kind, 0) / MIB for record in known]
        axes.barh(labels, sizes, left=left, color=colour, edgecolor="white", linewidth=0.6, label=kind)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for row, total in enumerate(left):
        axes.text(total * 1.01, row, f"{total:,.1f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(left, default=0.0) * 1.25 or 1.0)
    axes.set_title("memory without operands (MiB)")
    axes.grid(axis="x", alpha=0.3)
    if known:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8, frameon=False)
