"""`slope report`: runs side by side: loss, speed, memory, scores, versions; Markdown and a picture.

A run folder may lack files (it is still running, it was copied in part): what is missing is named, the rest is used.
"""

import dataclasses
import json
import math
from pathlib import Path

from slope_megatron.config.saved import SavedConfig
from slope_megatron.evaluation.plots import plot_runs
from slope_megatron.evaluation.scores import read_scores
from slope_megatron.storage import whole
from slope_megatron.storage.folders import output_folder
from slope_megatron.storage.metrics_file import read_metrics

MIB = 2**20
BYTES = ("weights", "patterns", "operands", "gradients", "optimizer")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run folder says about itself; empty where a file is missing."""

    label: str
    folder: Path
    description: dict
    metrics: list[dict]
    summary: dict
    scores: dict[str, dict[str, float]]
    missing: tuple[str, ...]

    @property
    def val_loss(self) -> float | None:
        """The last one measured."""
        last = next((line["val_loss"] for line in reversed(self.metrics) if line.get("val_loss") is not None), None)
        return self.summary.get("val_loss", last)


def read_run(folder: Path, label: str) -> RunRecord:
    """
    Raises:
        ValueError: no such folder, or it holds nothing of a run.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give run folders, such as runs/quickstart/sparse")
    missing = []

    def read(name: str) -> dict:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
            missing.append(f"{name} (damaged)")
        except FileNotFoundError:
            missing.append(name)
        except ValueError:
            missing.append(f"{name} (damaged)")
        except OSError as error:
            missing.append(f"{name} ({error.strerror})")
        return {}

    description, summary = read("run.json"), read("summary.json")
    metrics: list[dict] = []
    try:
        metrics, damaged = read_metrics(folder / "metrics.jsonl")
        if damaged:
            missing.append(f"{len(damaged)} lines of metrics.jsonl (damaged, passed over)")
    except FileNotFoundError:
        missing.append("metrics.jsonl")
    except OSError as error:
        missing.append(f"metrics.jsonl ({error.strerror})")
    if not (description or summary or metrics):
        raise ValueError(f"{folder} holds no run: it has none of run.json, summary.json and metrics.jsonl")
    return RunRecord(label, folder, description, metrics, summary, read_scores(folder), tuple(missing))


def labels_of(folders: list[Path]) -> list[str]:
    """Names that tell the folders apart: their last part, with parents where that is not enough."""
    absolute = [folder.absolute().resolve() for folder in folders]
    depth = 1
    while True:
        labels = ["/".join(folder.parts[-depth:]) for folder in absolute]
        if len(set(labels)) == len(labels) or depth >= max(len(folder.parts) for folder in absolute):
            return labels
        depth += 1


def write_report(folders: list[Path], out: Path, notes: tuple[str, ...] = ()) -> Path:
    """report.md, report.png and report.json in `out`; returns the Markdown's path.

    Args:
        notes: on all runs, beside what each one ran on.
    """
    records = [read_run(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]
    out = output_folder(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    plot_runs(records, out / "report.png")
    sections = (
        "# " + " and ".join(record.label for record in records),
        "![loss, speed and memory](report.png)",
        results(records),
        memory(records),
        double_pruning(records),
        scores(records),
        differences(records),
        provenance(records, notes),
        missing(records),
    )
    path = out / "report.md"
    whole.write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    figures = {record.label: {"summary": record.summary, "scores": record.scores} for record in records}
    whole.write_json(out / "report.json", figures)
    return path


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value, form: str = ",.0f", scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def results(records: list[RunRecord]) -> str:
    rows = []
    for record in records:
        loss, run = record.val_loss, record.summary
        speed = run.get("tokens_per_second")
        rows.append(
            [
                record.label,
                shown(loss, ".4f"),
                shown(None if loss is None else math.exp(min(loss, 80.0)), ",.2f"),
                shown(run.get("steps", record.metrics[-1]["step"] if record.metrics else None)),
                shown(run.get("tokens")),
                shown(speed),
                shown(run.get("parameters")),
                shown(run.get("train_seconds")),
            ]
        )
    head = ["run", "validation loss", "perplexity", "steps", "tokens", "tokens/s", "parameters held", "seconds"]
    text = "## Results\n\n" + table(head, rows)
    entropy = records[0].summary.get("unigram_entropy")
    if entropy:
        text += f"\n\nKnowing the tokens' frequencies alone would reach {entropy:.4f}, their unigram entropy."
    if any(record.summary.get("backend") == "reference" for record in records):
        text += (
            "\n\nThe backend `reference` unpacks sparse products and runs them dense: its tokens/s say nothing about "
            "sparse tensor cores, and its operands are larger than theirs."
        )
    return text


def memory(records: list[RunRecord]) -> str:
    """Measured state bytes, where a run has them; the ratio to the last run, which is the dense one by custom."""
    known = [record for record in records if record.summary.get("state_bytes")]
    if not known:
        return ""
    rows = []
    for scope, words in (("sparse_layers", "2:4 linears (dense: the same ones)"), ("model", "whole model")):
        for kind in BYTES:
            sizes = [record.summary["state_bytes"][scope].get(kind) for record in known]
            if any(sizes):
                ratio = f"{sizes[0] / sizes[-1]:.4f}" if len(sizes) > 1 and sizes[0] and sizes[-1] else "-"
                rows.append([f"{words}: {kind}", *(shown(size) for size in sizes), ratio])
    head = ["bytes (measured)", *(record.label for record in known), f"{known[0].label} / {known[-1].label}"]
    return "## Memory\n\n" + table(head, rows)


def double_pruning(records: list[RunRecord]) -> str:
    """What the second pruning, of the backward operand, costs the runs that have one."""
    found = {
        record.label: record.summary["double_pruning"] for record in records if record.summary.get("double_pruning")
    }
    if not found:
        return ""
    rows = [
        [label, *(shown(own[key], ".3%") for key in ("measured", "formula", "energy_lost"))]
        for label, own in found.items()
    ]
    head = ["run", "weights zeroed more", "formula, for independent rows", "energy of the kept weights in them"]
    return "## Double pruning\n\n" + table(head, rows)


def scores(records: list[RunRecord]) -> str:
    names = sorted(
        {(suite, metric) for record in records for suite, found in record.scores.items() for metric in found}
    )
    if not names:
        return ""
    rows = [
        [f"{suite}: {metric}", *(shown(record.scores.get(suite, {}).get(metric), ".4f") for record in records)]
        for suite, metric in names
    ]
    return "## Scores\n\n" + table(["score", *(record.label for record in records)], rows)


def differences(records: list[RunRecord]) -> str:
    """Settings that are not the same everywhere."""
    known = [record for record in records if record.description.get("config")]
    if len(known) < 2:
        return ""
    settings = []
    for record in known:
        saved = SavedConfig.read(record.description)
        own = {f"{section}.{key}": value for section, part in saved.values.items() for key, value in part.items()}
        settings.append({**own, **saved.unknown})
    names = sorted(set().union(*settings) - {"train.out", "train.resume", "train.overwrite"})
    rows = [
        [name, *(str(values.get(name, "-")) for values in settings)]
        for name in names
        if len({str(values.get(name, "-")) for values in settings}) > 1
    ]
    if not rows:
        return "## Settings\n\nAll runs have the same settings."
    return "## Settings that differ\n\n" + table(["setting", *(record.label for record in known)], rows)


def provenance(records: list[RunRecord], notes: tuple[str, ...]) -> str:
    """Versions, layout, type and backend."""
    lines = [f"- {note}" for note in notes]
    for record in records:
        run, said = record.summary, record.description
        versions = ", ".join(f"{name} {version}" for name, version in said.get("versions", {}).items())
        layout = ""
        if "ranks" in run:
            layout = (
                f"{run['ranks']} ranks (TP {run.get('tensor_parallel')}, PP {run.get('pipeline_parallel')}, "
                f"DP {run.get('data_parallel')}), "
            )
        before = run.get("attempts", [])[:-1]
        layout += "".join(f"to step {part['to_step']} {part['ranks']} ranks, " for part in before)
        kind = said.get("dtype", run.get("dtype", "unknown type"))
        lines.append(f"- {record.label}: {layout}{kind}, backend {run.get('backend', 'unknown')}; {versions}")
    return "## What they ran on\n\n" + "\n".join(lines)


def missing(records: list[RunRecord]) -> str:
    lines = [f"- {record.label} has no {', '.join(record.missing)}" for record in records if record.missing]
    return "## Missing\n\n" + "\n".join(lines) if lines else ""
