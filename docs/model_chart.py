"""README's first figure, kernels/results/models.png: tokens/s of whole models, measured by `slope bench model`.

python docs/model_chart.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from performance_tables import RESULTS, WHOLE, rounded, rows, speed_of, thousands

COLOURS = {"dense": "#8c8c8c", "dense-fp8": "#c9a46b", "paper": "#4c78a8", "full": "#2f4b7c", "fp8": "#e07b39"}
LABELS = {
    "dense": "dense bf16",
    "dense-fp8": "dense e4m3 (in the benchmark only)",
    "paper": "2:4, mode paper",
    "full": "2:4, mode full",
    "fp8": "2:4, e4m3",
}


def draw(axes, name: str, label: str) -> None:
    """One model: a bar a mode, the mean of its visits; dense e4m3 where it was run."""
    found = rows(name)
    modes = [mode for mode in COLOURS if mode != "dense-fp8" or any(row["mode"] == mode for row in found)]
    for place, mode in enumerate(modes):
        own = [row for row in found if row["mode"] == mode]
        if not own:
            text = " does not fit" if mode == "dense" else " not run"
            axes.text(place, 0, text, rotation=90, ha="center", va="bottom", fontsize=9, color=COLOURS[mode])
            continue
        gain = f"\n{rounded(own[0]['ratio'], 2)} x" if mode != "dense" and own[0]["ratio"] else ""
        bar = axes.bar(place, float(speed_of(own)), 0.8, color=COLOURS[mode])
        axes.bar_label(bar, [f"{thousands(own)}{'*' if len(own) == 1 else ''}{gain}"], fontsize=9)
    axes.set_title(label, fontsize=10)
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(modes) - 0.4)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> Path:
    figure, every = plt.subplots(1, len(WHOLE), figsize=(13, 3.6), layout="constrained")
    for axes, (name, label) in zip(every, WHOLE.items(), strict=True):
        draw(axes, name, label.replace(", ", ",\n"))
    every[0].set_ylabel("thousand tokens/s on one H200\n(* one visit, else the mean of two)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, LABELS.values(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    path = RESULTS / "models.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    print(main())
