"""`slope study --report`: report.md with tables, and its charts, of the rows that are there."""

from collections.abc import Sequence
from pathlib import Path

from slope_megatron.evaluation.run_report import shown, table
from slope_megatron.storage import whole
from slope_megatron.study import charts, figures
from slope_megatron.study.controls import speedup_of_run
from slope_megatron.study.figures import Cell, Ladder, Pair
from slope_megatron.study.rows import Row, Rows
from slope_megatron.study.runs import Run, millions
from slope_megatron.study.settings import Study

Speedups = dict[str, dict[str, float]]
# Times the smallest and largest size that was trained.
BEYOND = 10


def write_report(study: Study, runs: Sequence[Run], rows: Rows, out: Path) -> Path:
    """report.md and its pictures in `out`; returns the Markdown's path.

    Raises:
        ValueError: there is no row of these runs.
    """
    pairs = pairs_of(runs, rows)
    if not pairs:
        raise ValueError(f"{rows.path} has no row of these runs: train some first")
    out.mkdir(parents=True, exist_ok=True)
    found = figures.cells(pairs)
    styles, speedups = charts.styles_of(list(study.methods)), speedups_of(study, runs)
    sections = [
        f"# Study {study.name}",
        progress(runs, pairs),
        sweeps(found, out, styles),
        ladder(speedups, figures.ladders(found), out, styles),
        costs(study, speedups, found, out, styles),
        spread(pairs),
        all_runs(pairs),
        missing(runs, rows),
    ]
    path = out / "report.md"
    whole.write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def pairs_of(runs: Sequence[Run], rows: Rows) -> list[Pair]:
    """The runs that have a row, with it."""
    return [(run, row) for run in runs if run.lr is not None and (row := rows.find(run.key))]


def warnings_of(runs: Sequence[Run], rows: Rows) -> list[str]:
    """Of sweeps that are complete and do not tell an optimum."""
    left = {(run.group, run.size, run.method) for run in runs if run.lr is None or rows.find(run.key) is None}
    found = figures.cells(pairs_of(runs, rows))
    return [
        f"{cell.group}: {cell.size} {cell.method}: {warning}"
        for cell in found
        if (cell.group, cell.size, cell.method) not in left and (warning := warning_of(cell))
    ]


def progress(runs: Sequence[Run], pairs: Sequence[Pair]) -> str:
    trained = {row.key: row for _, row in pairs}.values()
    tokens = sum(row.tokens for row in trained)
    seconds = sum((row.seconds or 0.0) / row.at_once for row in trained)
    devices = ", ".join(sorted({row.device for row in trained if row.device})) or "unknown devices"
    return (
        f"{len(pairs)} of {len(runs)} runs have a row: {millions(tokens)} M tokens in {seconds / 60:,.1f} minutes of "
        f"training on {devices}. Losses are of validation, nats per token, at the last step."
    )


def sweeps(found: Sequence[Cell], out: Path, styles: dict[str, dict]) -> str:
    """Learning rates; the optimum is bold, and one at an edge is warned of."""
    swept = [cell for cell in found if len(cell.losses) > 1]
    parts = []
    for group in dict.fromkeys(cell.group for cell in swept):
        own = [cell for cell in swept if cell.group == group]
        rates = sorted({lr for cell in own for lr in cell.losses})
        lines = [[cell.size, cell.method, *(shown_loss(cell, lr) for lr in rates), warning_of(cell)] for cell in own]
        head = ["size", "method", *(f"{lr:g}" for lr in rates), ""]
        picture = f"{group}.png"
        charts.draw_sweep(out / picture, own, styles)
        parts.append(f"## Learning rates: {group}\n\n![loss and learning rate]({picture})\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def shown_loss(cell: Cell, lr: float) -> str:
    if lr not in cell.losses:
        return "-"
    loss = cell.losses[lr]
    if loss is None:
        return "diverged"
    return f"**{loss:.4f}**" if lr == cell.best_lr else f"{loss:.4f}"


def warning_of(cell: Cell) -> str:
    if cell.best_lr is None:
        return "all diverged: add lower rates"
    if cell.optimum_at_edge:
        return f"optimum at the {'low' if cell.best_lr == min(cell.losses) else 'high'} edge: widen the sweep"
    return ""


def ladder(speedups: Speedups, found: Sequence[Ladder], out: Path, styles: dict[str, dict]) -> str:
    """Lines over the sizes, and where they cross the dense one."""
    parts = []
    for group in dict.fromkeys(one.group for one in found):
        own = [one for one in found if one.group == group]
        sizes = list(dict.fromkeys(size for one in own for size in one.sizes))
        picture = f"{group}-lines.png"
        charts.draw_lines(out / picture, own, speedups, styles)
        lines = []
        for one in own:
            losses = {size: f"{loss:.4f}" for size, (_, loss) in zip(one.sizes, one.points, strict=True)}
            line = one.line()
            lines.append([one.method, *(losses.get(size, "-") for size in sizes), f"{line.slope:.4f}"])
        head = ["method", *sizes, "slope of log loss by log compute"]
        text = f"## Sizes: {group}\n\n![loss and compute]({picture})\n\n{table(head, lines)}"
        parts += [text, crossings(speedups, own)]
    return "\n\n".join(part for part in parts if part)


def crossings(speedups: Speedups, own: Sequence[Ladder]) -> str:
    """At which size a method's line meets the dense one, in compute and in the time that its speed-ups leave."""
    dense = next((one for one in own if one.method == "dense"), None)
    if dense is None:
        return ""
    lines = []
    for one in own:
        if one is dense:
            continue
        for model, gains in {"": {one.method: 1.0}, **speedups}.items():
            if one.method in gains:
                lines.append(crossing(dense, one, model, gains[one.method]))
    head = ["method", "at equal", "speed-up", "better from / until", "one size left out", "loss there"]
    return (
        "Where lines cross the dense one: parameters of the dense model there, in its blocks, and what they become "
        f"with one size left out. Beyond {BEYOND} times the sizes that were trained, lines tell nothing.\n\n"
        + table(head, lines)
        if lines
        else ""
    )


def crossing(dense: Ladder, one: Ladder, model: str, speedup: float) -> list[str]:
    ours, theirs = one.line(speedup), dense.line()
    where = [one.method, f"time of {model}" if model else "compute", f"{speedup:g}"]
    flops = ours.crossing(theirs)
    if flops is None:
        return [*where, "nowhere: the lines are parallel", "-", "-"]
    side = "from" if ours.slope < theirs.slope else "until"
    parameters = dense.parameters_at(flops)
    others = [shown_size(dense, other) for other in figures.crossings_without(dense, one, speedup)]
    low, high = trusted(dense)
    loss = f"{ours.at(flops):.3f}" if low <= parameters <= high else "-"
    return [*where, f"{side} {shown_size(dense, parameters)}", "; ".join(others) or "-", loss]


def trusted(ladder: Ladder) -> tuple[float, float]:
    """Parameters as far as a ladder's line tells something."""
    return min(ladder.parameters) / BEYOND, max(ladder.parameters) * BEYOND


def shown_size(ladder: Ladder, parameters: float | None) -> str:
    low, high = trusted(ladder)
    if parameters is None:
        return "nowhere"
    return (
        f"below {low:.3g}" if parameters < low else f"beyond {high:.3g}" if parameters > high else f"{parameters:.3g}"
    )


def speedups_of(study: Study, runs: Sequence[Run]) -> Speedups:
    """MODEL -> METHOD -> its speed-up: of its sparse steps, and of dense steps and models 1."""
    configs = {run.method: run.config for run in runs}
    found: Speedups = {}
    for model, gains in study.speedups.items():
        found[model] = dict.fromkeys((name for name in configs if is_dense(study, name)), 1.0)
        for name, config in configs.items():
            gain = gains.get(study.timed_as(name))
            if gain is not None:
                found[model][name] = speedup_of_run(config, gain)
    return found


def is_dense(study: Study, method: str) -> bool:
    own = {**study.base.get("slope", {}), **study.methods[method].sections.get("slope", {})}
    return not own.get("enabled", True) or own.get("method") == "dense"


def costs(study: Study, speedups: Speedups, found: Sequence[Cell], out: Path, styles: dict[str, dict]) -> str:
    """Loss, averaged over the seeds, against time and against memory, of each method's best cell of a size."""
    best = best_cells(found)
    bytes_of = {(cell.size, cell.method): row.state_bytes for cell, row, _ in best}
    labels = {
        f"loss and time, as {model} gains": "time, in FLOPs that the dense model does in it" for model in speedups
    }
    labels["loss and memory"] = "state bytes (measured)"
    series: dict[str, charts.Series] = {title: {} for title in labels}
    lines = []
    for cell, row, loss in best:
        times = [row.flops / gains[cell.method] if cell.method in gains else None for gains in speedups.values()]
        held = bytes_of.get((cell.size, study.sized_as(cell.method)))
        for title, cost in zip(labels, [*times, held], strict=True):
            if cost:
                series[title].setdefault(cell.method, []).append((cost, loss))
        figures_of_row = [millions(row.tokens), f"{row.flops:.4g}", f"{row.average_parameters:,.0f}"]
        shown_times = [shown(time, ".4g") for time in times]
        lines.append([cell.size, cell.method, f"{loss:.4f}", *figures_of_row, shown(held), *shown_times])
    if not lines:
        return ""
    charts.draw_costs(out / "costs.png", series, labels, styles)
    head = ["size", "method", "loss", "M tokens", "FLOPs as dense", "average parameters", "state bytes"]
    head += [f"time ({model})" for model in speedups]
    return f"## Time and memory\n\n![loss against time and memory](costs.png)\n\n{table(head, lines)}"


def best_cells(found: Sequence[Cell]) -> list[tuple[Cell, Row, float]]:
    """Of each size and method, the cell of the most tokens, then seeds, then the lowest loss; its best row and loss."""
    chosen: dict[tuple[str, str], tuple[Cell, Row, float]] = {}
    for cell in found:
        row, loss = cell.best_row, cell.loss
        if row is None or loss is None:
            continue
        before = chosen.get((cell.size, cell.method))
        if before is None or (row.tokens, cell.seeds, -loss) > (before[1].tokens, before[0].seeds, -before[2]):
            chosen[cell.size, cell.method] = cell, row, loss
    return list(chosen.values())


def spread(pairs: Sequence[Pair]) -> str:
    lines = [
        [
            *(one.size, one.method, f"{one.lr:g}", millions(one.tokens), str(len(one.losses))),
            *(f"{one.mean:.4f}", f"{one.deviation:.4f}", f"{min(one.losses):.4f} to {max(one.losses):.4f}"),
        ]
        for one in figures.spreads(pairs)
    ]
    if not lines:
        return ""
    head = ["size", "method", "lr", "M tokens", "seeds", "mean loss", "standard deviation", "range"]
    return f"## Spread over seeds\n\n{table(head, lines)}"


def all_runs(pairs: Sequence[Pair]) -> str:
    lines = [
        [
            *(run.name, "diverged" if row.val_loss is None else f"{row.val_loss:.4f}", f"{row.lr:g}"),
            *(millions(row.tokens), "-" if row.seconds is None else f"{row.seconds:,.0f}", str(row.at_once)),
        ]
        for run, row in pairs
    ]
    return f"## All runs\n\n{table(['run', 'loss', 'lr', 'M tokens', 'seconds', 'at once'], lines)}"


def missing(runs: Sequence[Run], rows: Rows) -> str:
    names = [run.name for run in runs if run.lr is None or rows.find(run.key) is None]
    return f"## Not trained yet\n\n{', '.join(names)}" if names else ""
