"""The planner's picture: what fills the fullest GPU, and the time of a step, layout by layout."""

from pathlib import Path

from slope_megatron.launch.memory import GIB
from slope_megatron.launch.planner import Row

MOST_LAYOUTS = 12


def draw(path: Path, rows: list[Row], capacity_gib: float, title: str) -> None:
    """Write a PNG of the fastest layouts, dense beside 2:4."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs: dict = {}
    for row in sorted(rows, key=lambda row: row.seconds):
        pairs.setdefault(row.layout, {})[row.kind] = row
    chosen = dict(list(pairs.items())[:MOST_LAYOUTS])
    names = list(next(iter(chosen.values()))["sparse"].bytes)
    figure, (memory, time) = plt.subplots(2, 1, figsize=(max(8, 0.9 * len(chosen)), 9), sharex=True)
    colours = plt.get_cmap("tab10")(range(10))
    for index, pair in enumerate(chosen.values()):
        for offset, kind in ((-0.2, "dense"), (0.2, "sparse")):
            bottom = 0.0
            for colour, name in zip(colours, names, strict=False):
                height = pair[kind].bytes[name] / GIB
                memory.bar(index + offset, height, 0.36, bottom, color=colour, hatch="//" if kind == "dense" else None)
                bottom += height
            colour = colours[0] if kind == "dense" else colours[2]
            time.bar(index + offset, pair[kind].seconds, 0.36, color=colour, alpha=1.0 if pair[kind].fits else 0.3)
    memory.axhline(capacity_gib, color="black", linestyle="--")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours[: len(names)]]
    memory.legend(handles, names, fontsize=7, ncols=3)
    memory.set_ylabel("GiB on the fullest GPU (hatched: dense)")
    time.set_ylabel("s a step (pale: does not fit; green: 2:4)")
    time.set_xticks(range(len(chosen)), [str(layout) for layout in chosen], rotation=60, ha="right", fontsize=7)
    memory.set_title(title, fontsize=9)
    figure.tight_layout()
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
    partial.replace(path)
