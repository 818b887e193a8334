"""Charts of a study; methods differ by colour, mark and line, as in `evaluation.plots`."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from slope_megatron.evaluation.plots import STYLES, save
from slope_megatron.study.figures import Cell, Ladder

Series = dict[str, list[tuple[float, float]]]


def styles_of(methods: Sequence[str]) -> dict[str, dict]:
    """One style a method, the same in all charts; behind the eighth, colours come again with another mark."""
    count = len(STYLES)
    return {
        method: {**STYLES[index % count], "marker": STYLES[(index + index // count) % count]["marker"]}
        for index, method in enumerate(methods)
    }


def draw_sweep(path: Path, found: Sequence[Cell], styles: dict[str, dict]) -> None:
    """Loss against learning rate, a panel a size; a ring is at each method's optimum."""
    sizes = list(dict.fromkeys(cell.size for cell in found))
    with panels(path, len(sizes)) as all_axes:
        for axes, size in zip(all_axes, sizes, strict=True):
            for cell in (cell for cell in found if cell.size == size):
                points = [(lr, loss) for lr, loss in cell.losses.items() if loss is not None]
                if not points or cell.loss is None:
                    continue
                note = " (optimum at the edge)" if cell.optimum_at_edge else ""
                label = f"{cell.method}: {cell.loss:.3f} at {cell.best_lr:g}{note}"
                axes.plot(*zip(*points, strict=True), **styles[cell.method], markersize=4, label=label)
                axes.plot(
                    *([cell.best_lr], [cell.loss], "o"),
                    **{"markersize": 12, "fillstyle": "none", "color": styles[cell.method]["color"]},
                )
            finish(axes, f"{size}: loss and learning rate", "peak learning rate", log_y=False)


def draw_lines(path: Path, ladders: Sequence[Ladder], speedups: dict[str, dict[str, float]], styles) -> None:
    """Log loss against log compute; and against time, in what the dense model computes in it, a panel a model.

    Args:
        speedups: MODEL -> METHOD -> tokens/s over the dense model's; a method without one is not in that panel.
    """
    titles = {"": "loss and compute (as dense)", **{model: f"loss and time, as {model} gains" for model in speedups}}
    with panels(path, len(titles)) as all_axes:
        for axes, (model, title) in zip(all_axes, titles.items(), strict=True):
            for ladder in ladders:
                speedup = speedups[model].get(ladder.method) if model else 1.0
                if speedup is None:
                    continue
                line, style = ladder.line(speedup), styles[ladder.method]
                points = [(flops / speedup, loss) for flops, loss in ladder.points]
                label = f"{ladder.method}: slope {line.slope:.3f}"
                axes.plot(*zip(*points, strict=True), **{**style, "linestyle": ""}, markersize=5, label=label)
                ends = [points[0][0], points[-1][0]]
                axes.plot(ends, [line.at(x) for x in ends], **{**style, "marker": ""}, linewidth=1)
            unit = "FLOPs" if not model else "time, in FLOPs that the dense model does in it"
            finish(axes, title, f"training {unit}")


def draw_costs(path: Path, series: dict[str, Series], labels: dict[str, str], styles) -> None:
    """Loss against one cost a panel, a mark a run.

    Args:
        series: title -> method -> (cost, loss); `labels`: title -> what the cost is.
    """
    with panels(path, len(series)) as all_axes:
        for axes, (title, methods) in zip(all_axes, series.items(), strict=True):
            for method, points in methods.items():
                style = {**styles[method], "markersize": 5, "linewidth": 0.7}
                axes.plot(*zip(*sorted(points), strict=True), **style, label=method)
            finish(axes, title, labels[title])


@contextlib.contextmanager
def panels(path: Path, count: int) -> Iterator[list]:
    """Axes side by side; the picture is written at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, count, figsize=(6.5 * count, 6), dpi=110, layout="constrained", squeeze=False)
    try:
        yield list(grid[0])
        save(figure, path)
    finally:
        plt.close(figure)


def finish(axes, title: str, label: str, log_y: bool = True) -> None:
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
        # Losses lie within one decade: plain numbers at minor ticks as well.
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
