"""What every benchmark shares: the machine's description, its copy bandwidth, CSV files and charts."""

import csv
import os
from pathlib import Path

import torch

from slope_megatron.ops import choices
from slope_megatron.ops.autotune import timing
from slope_megatron.storage import earlier

HATCHES = ("", "//", "..", "\\\\", "xx", "--")
# Dense-equivalent bf16 rate of 2:4 tensor cores by the vendor's datasheets, TFLOP/s.
SPARSE_PEAK = {"H200": 1979, "H100": 1979, "A100": 624}
# Files of this process: what else is in a file of that name was another's.
_written: set[Path] = set()


def machine() -> str:
    """GPU and versions, in one line."""
    return " ".join(f"{name}={value.replace(' ', '_')}" for name, value in choices.machine().items())


def sparse_peak() -> float | None:
    """TFLOP/s; None for a GPU that is not listed."""
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in SPARSE_PEAK.items() if part in name), None)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    samples = timing.interleaved({"": lambda: target.copy_(source)}, rounds=9, calls=3)[""]
    return 2 * source.numel() * source.element_size() / timing.median(samples) * 1e3


def write_csv(name: str, rows: list[dict], folder: Path | None = None, note: str = "") -> Path:
    """`<name>.csv`, all of it in one step; the first line, a comment, is the machine.

    Called after every row or few: a benchmark that is stopped leaves those it has. An earlier benchmark's rows are kept
    in the folder `earlier`.

    Args:
        note: what else the first line says.
    """
    folder = Path(folder or ".")
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(os.path.realpath(folder / f"{name}.csv"))
    if path not in _written:
        earlier.set_aside(path, "these rows are of an earlier benchmark")
        _written.add(path)
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="") as file:
        file.write(f"# {note}{'; ' if note else ''}{machine()}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)
    return path


def rounded(row: dict) -> dict:
    """Four significant digits are more than the spread allows."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def print_table(rows: list[dict], columns: list[str]) -> None:
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in columns}
    for row in [{name: name for name in columns}, *rows]:
        print("  ".join(str(row[name]).ljust(widths[name]) for name in columns), flush=True)


def bar_chart(
    name: str,
    labels: list[str],
    series: dict[str, list[float]],
    title: str,
    folder: Path | None = None,
    measure: str = "times dense bf16",
):
    """`<name>.png`: groups of bars, a line at 1; `measure` says what 1 is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(8, 0.32 * len(labels) * len(series)), 4.5), layout="constrained")
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        positions = [group + index * width for group in range(len(labels))]
        axes.bar(positions, values, width, label=label, hatch=HATCHES[index % len(HATCHES)], edgecolor="white")
    axes.set_xticks([group + 0.4 - width / 2 for group in range(len(labels))], labels, rotation=60, ha="right")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel(measure)
    # Above the picture: inside it would cover bars. Hatches tell the series apart in greyscale.
    figure.legend(fontsize=8, loc="outside upper center", ncols=min(len(series), 5), frameon=False)
    axes.set_title(title, fontsize=8)
    path = Path(folder or ".") / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def require_gpu() -> None:
    """Refuse a machine where there is nothing to measure.

    Raises:
        ValueError: with the reason.
    """
    from slope_megatron.ops.operands.cusparselt import unsupported

    reason = unsupported()
    if reason:
        raise ValueError(f"slope bench measures 2:4 kernels against dense ones, and this machine cannot: {reason}")
