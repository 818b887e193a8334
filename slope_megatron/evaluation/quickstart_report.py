"""The report of `slope quickstart`: the sparse run beside its dense twin, in words, figures and one plot."""

import math
import os
import platform
from pathlib import Path

from slope_megatron.evaluation.plots import plot_losses
from slope_megatron.storage import whole

MIB = 2**20


def build_summary(sparse: dict, dense: dict | None, manifest: dict, seconds: dict[str, float]) -> dict:
    """The figures of the report, for programs.

    Args:
        sparse, dense: the runs' summaries.
        manifest: of the prepared data.
        seconds: wall time of each stage.
    """
    runs = {"sparse": sparse, **({"dense": dense} if dense else {})}
    return {
        **runs,
        "unigram_entropy": sparse["unigram_entropy"],
        "double_prune_extra_zeros": sparse["double_pruning"],
        "corpus": {"source": manifest["source"], **corpus_of(manifest)},
        "seconds": seconds["total"],
        "stage_seconds": seconds,
        "machine": machine(),
    }


def machine() -> dict:
    """What it ran on."""
    return {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write_report(
    out: Path, summary: dict, configs: dict[str, dict], manifest: dict, versions: dict, dtype_reason: str
) -> None:
    """report.md, loss.png and summary.json in `out`; the runs lie in `out`/sparse and `out`/dense."""
    runs = {name: out / name for name in ("sparse", "dense") if name in summary}
    sparse_config = configs["sparse"]
    start = int((1.0 - sparse_config["slope"]["lazy_fraction"]) * sparse_config["train"]["steps"] + 1e-9)
    plot_losses(runs, out / "loss.png", adapter_start=start, unigram_entropy=summary["unigram_entropy"])
    whole.write_json(out / "summary.json", summary)
    sections = (
        headline(summary),
        "![loss](loss.png)",
        results_table(summary),
        bytes_table(summary),
        pruning_paragraph(summary),
        set_up(summary, configs, manifest, versions, dtype_reason, start),
    )
    whole.write_text(out / "report.md", "# Quickstart report\n\n" + "\n\n".join(sections) + "\n")


def headline(summary: dict) -> str:
    """One paragraph that says what was found."""
    sparse = summary["sparse"]
    entropy = summary["unigram_entropy"]
    text = (
        f"The 2:4 sparse model reached a validation loss of **{sparse['val_loss']:.3f}** nats per token "
        f"({sparse['val_loss'] / entropy:.2f} of the unigram entropy, {entropy:.3f})"
    )
    if "dense" not in summary:
        return text + "."
    dense = summary["dense"]
    gap = 100 * (sparse["val_loss"] / dense["val_loss"] - 1)
    return text + f"; its dense twin **{dense['val_loss']:.3f}**. The gap is {gap:+.1f} %."


def results_table(summary: dict) -> str:
    rows = ["| run | validation loss | perplexity | tokens | tokens/s | parameters held | training |", "|---" * 7 + "|"]
    for name in ("sparse", "dense"):
        if name in summary:
            run = summary[name]
            rows.append(
                f"| {name} | {run['val_loss']:.4f} | {math.exp(run['val_loss']):.1f} | {run['tokens']:,} | "
                f"{run['tokens_per_second']:,.0f} | {run['parameters']:,} | {run['train_seconds']:.0f} s |"
            )
    note = (
        "Tokens/s on a CPU say nothing about sparse tensor cores: here the sparse products are unpacked and run dense "
        "(backend `reference`)."
    )
    return "## Results\n\n" + "\n".join(rows) + "\n\n" + note


def bytes_table(summary: dict) -> str:
    """Measured bytes, sparse beside dense."""
    rows = ["| bytes (measured) | sparse | dense | sparse / dense |", "|---" * 4 + "|"]
    names = {"sparse_layers": "2:4 linears", "model": "whole model"}
    for scope, label in names.items():
        for kind in ("weights", "patterns", "gradients", "optimizer"):
            sparse = summary["sparse"]["state_bytes"][scope][kind]
            if "dense" not in summary:
                rows.append(f"| {label}: {kind} | {sparse:,} | - | - |")
                continue
            dense = summary["dense"]["state_bytes"][scope][kind]
            ratio = f"{sparse / dense:.4f}" if dense else "-"
            rows.append(f"| {label}: {kind} | {sparse:,} | {dense:,} | {ratio} |")
    operands = summary["sparse"]["state_bytes"]["model"]["operands"]
    return (
        "## Memory\n\nOne model, all its tensor-parallel shards; optimizer: fp32 masters and both moments, over all "
        "ZeRO partitions.\n\n" + "\n".join(rows) + "\n\n"
        f"The CPU backend also keeps unpacked operands, {operands / MIB:.1f} MiB; sparse tensor cores read packed ones."
    )


def pruning_paragraph(summary: dict) -> str:
    found = summary["double_prune_extra_zeros"]
    return (
        "## Double pruning\n\n"
        f"The second pruning zeroes a further {100 * found['measured']:.3f} % of all weights in the backward operand "
        f"(formula, for rows that are independent: {100 * found['formula']:.3f} %), "
        f"which carry {100 * found['energy_lost']:.2f} % of the kept weights' energy."
    )


def corpus_of(manifest: dict) -> dict:
    """Bytes, documents and checksum of the text: the quickstart has one source."""
    (source,) = manifest["sources"]
    return source["corpus"]


def set_up(summary, configs, manifest, versions, dtype_reason, adapter_start) -> str:
    """What was run, on what, where."""
    run, config = summary["sparse"], configs["sparse"]
    model, optimizer, slope, train = (config[section] for section in ("model", "optimizer", "slope", "train"))
    corpus = corpus_of(manifest)
    splits = ", ".join(f"{name} {split['tokens']:,}" for name, split in manifest["splits"].items())
    lines = [
        f"- machine: {summary['machine']['processor']}, {summary['machine']['cores']} cores, "
        f"{summary['machine']['system']}",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"- corpus: {manifest['source']}, {corpus['bytes'] / 1e6:.1f} MB, SHA-256 {corpus['sha256']}; "
        f"tokens: {splits}; SentencePiece BPE, {manifest['vocab_size']} pieces; documents are split by file",
        f"- model: OPT-shaped, {model['num_layers']} layers, width {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads; "
        f"every block linear is {slope['nm']} but the first after the input",
        f"- ranks: {run['ranks']} on gloo, tensor parallel {run['tensor_parallel']} x data parallel "
        f"{run['data_parallel']}, "
        f"DeepSpeed ZeRO-1, started by the `deepspeed` launcher",
        f"- parameter type: {run['dtype']} ({dtype_reason})",
        f"- training: {train['steps']} steps of {config['data']['global_batch_size']} x "
        f"{config['data']['seq_length']} tokens, "
        f"AdamW, cosine schedule from a learning rate of {optimizer['lr']:g}, warm-up "
        f"{optimizer['warmup_steps']} steps, "
        f"clipping at {optimizer['clip_grad']:g}, seed {train['seed']}",
        f"- learning rates: dense {configs.get('dense', config)['optimizer']['lr']:g}; sparse values "
        f"{slope['lr_multiplier']:g} x {optimizer['lr']:g} (sparse weights take a higher one, so each run has its own)",
        f"- adapters: rank {slope['adapter_rank']}, from step {adapter_start} on: lazy fraction "
        f"{slope['lazy_fraction']:g}, "
        "ten times the paper's 0.01, so that they can be seen to learn in a short run",
        f"- column pattern: chosen anew every {slope['backward_mask_interval']} steps; row pattern: {slope['pattern']}",
        "- seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in summary["stage_seconds"].items()),
    ]
    return "## What was run\n\n" + "\n".join(lines)
