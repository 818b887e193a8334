"""The planner's picture: what fills the fullest GPU, and the time of a step, layout by layout."""

import functools
import os
from pathlib import Path

from slope_megatron.planner.memory import GIB
from slope_megatron.planner.plan import Row

MOST_LAYOUTS = 12
# Dark and light in turn, so that neighbours differ in greyscale too.
COLOURS = ("#1b3a5c", "#e69f00", "#0072b2", "#f0e442", "#56b4e9", "#8c510a", "#cfcfcf", "#4d4d4d", "#cc79a7", "#009e73")


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
    figure, (memory, time) = plt.subplots(2, 1, figsize=(max(10, 0.9 * len(chosen)), 9.5), sharex=True)
    for index, pair in enumerate(chosen.values()):
        for offset, kind in ((-0.2, "dense"), (0.2, "sparse")):
            bottom = 0.0
            hatch = "//" if kind == "dense" else None
            for colour, name in zip(COLOURS, names, strict=False):
                height = pair[kind].bytes[name] / GIB
                memory.bar(
                    *(index + offset, height, 0.36, bottom), color=colour, hatch=hatch, edgecolor="white", linewidth=0.4
                )
                bottom += height
            face = COLOURS[2] if pair[kind].fits else "white"
            time.bar(index + offset, pair[kind].seconds, 0.36, color=face, hatch=hatch, edgecolor="black")
    limit = memory.axhline(capacity_gib, color="black", linestyle="--")
    patch = functools.partial(plt.Rectangle, (0, 0), 1, 1)
    parts = [patch(facecolor=colour, edgecolor="white") for colour in COLOURS[: len(names)]]
    kinds = [patch(facecolor="grey", hatch="//", edgecolor="white"), patch(facecolor="grey")]
    memory.legend(
        [*parts, *kinds, limit],
        [*names, "hatched: dense", "plain: 2:4", f"limit: {capacity_gib:g} GiB"],
        **{"fontsize": 7, "ncols": 6, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False},
    )
    time.legend(
        [
            patch(facecolor=COLOURS[2], edgecolor="black", hatch="//"),
            patch(facecolor=COLOURS[2], edgecolor="black"),
            patch(facecolor="white", edgecolor="black"),
        ],
        ["dense", "2:4", "white: does not fit"],
        **{"fontsize": 7, "ncols": 3, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False},
    )
    memory.set_ylabel("memory of the fullest GPU (GiB)")
    time.set_ylabel("time of a step (s, estimated)")
    time.set_xticks(range(len(chosen)), [str(layout) for layout in chosen], rotation=60, ha="right", fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path = Path(os.path.realpath(path))  # a link is followed, not replaced
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
    partial.replace(path)
