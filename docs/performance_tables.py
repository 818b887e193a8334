"""The tables of measured figures in docs/performance.md, made from the CSV files of kernels/results.

    python docs/performance_tables.py       # rewrites what stands between `<!-- table NAME -->` and `<!-- end -->`

A test compares the page with what this gives, so no figure on it is typed by hand or goes stale.
"""

import csv
import re
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "kernels" / "results"
PAGES = [ROOT / "docs" / "performance.md"]
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.S)

MODELS = ["opt-2.6b", "opt-6.6b", "opt-13b", "opt-30b", "opt-66b", "llama-3-8b", "mistral-7b"]
BLOCK_ROWS = [
    ("training, `--slope-mode paper`", "paper", "train"),
    ("training, `--slope-mode full`", "full", "train"),
    ("training, `--slope-fp8 current`", "fp8", "train"),
    ("training, dense e4m3", "dense-fp8", "train"),
    ("forward alone, 2:4 bf16", "paper", "forward"),
    ("forward alone, 2:4 e4m3", "fp8", "forward"),
    ("forward alone, dense e4m3", "dense-fp8", "forward"),
]
PEERS = [
    ("torch's 2:4 tensor", "torch-cusparselt"),
    ("FST-style", "fst-style"),
    ("`paper`", "paper"),
    ("`full`", "full"),
    ("`paper`, backend `cutlass`", "cutlass"),
    ("e4m3", "fp8"),
    ("e4m3, wgrad in bf16", "fp8-wgrad16"),
    ("dense e4m3", "dense-fp8"),
]
MODES = {"dense": "dense", "paper": "`paper`", "full": "`full`"}


def rows(name: str) -> list[dict[str, str]]:
    """The rows of one CSV file, whose first line names GPU and versions."""
    with open(RESULTS / f"{name}.csv") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def find(found: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    """The one row that has these values.

    Raises:
        ValueError: none has, or several.
    """
    matching = [row for row in found if all(row[key] == value for key, value in wanted.items())]
    if len(matching) != 1:
        raise ValueError(f"{len(matching)} rows have {wanted}: a figure of a page must come from one")
    return matching[0]


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def rounded(figure: str, digits: int) -> str:
    """A CSV file's figure with fewer digits, halves up; binary numbers would round some of them down."""
    return str(Decimal(figure).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def ratio_of(found: list[dict[str, str]], model: str, mode: str, part: str) -> str:
    return find(found, **{"model": model, "mode": mode, "pass": part})["ratio"]


def block() -> str:
    """Times dense of every model's block."""
    found, body = rows("block"), []
    for label, mode, part in BLOCK_ROWS:
        body.append([label, *(rounded(ratio_of(found, model, mode, part), 3) for model in MODELS)])
    return table(["", *MODELS], body)


# File of `slope bench model` -> what it is called.
WHOLE = {
    "models/llama-3-8b": "LLaMA-3-8B",
    "models/llama-3-8b-16-layers": "LLaMA-3-8B, 16 of its 32 blocks",
    "models/opt-2.6b": "OPT-2.6B",
    "models/opt-66b-tp8": "OPT-66B, one rank's share at TP 8",
    "models/gpt2-small": "GPT-2 small",
}
WHOLE_MODES = {"dense": "dense", "dense-fp8": "dense e4m3", "paper": "`paper`", "full": "`full`", "fp8": "2:4 e4m3"}


def speed_of(found: list[dict[str, str]]) -> Decimal:
    """Tokens/s of a mode's visits, their mean, in thousands."""
    return sum((Decimal(row["tokens_per_second"]) for row in found), Decimal(0)) / len(found) / 1000


def thousands(found: list[dict[str, str]]) -> str:
    speed = speed_of(found)
    return f"{rounded(str(speed), 0 if speed >= 100 else 1)}k"


def whole() -> str:
    """Steps of whole models: tokens/s, times dense, peak memory."""
    body = []
    for name, label in WHOLE.items():
        line = [label]
        for mode in WHOLE_MODES:
            own = [row for row in rows(name) if row["mode"] == mode]
            if not own:
                line.append("does not fit" if mode == "dense" else "not run")
                continue
            gain = f", {rounded(own[0]['ratio'], 2)} x" if mode != "dense" and own[0]["ratio"] else ""
            line.append(f"{thousands(own)}{gain} ({rounded(own[0]['peak_gib'], 0)} GiB)")
        body.append(line)
    return table(["tokens/s, times dense, peak memory", *WHOLE_MODES.values()], body)


def busy() -> str:
    """The share of a step in which the GPU works, and the planner's memory: least and most over all modes."""
    body = []
    for name, label in WHOLE.items():
        # What dense e4m3 takes is not planned: the trainer has no such mode.
        found = [row for row in rows(name) if row["planned_gib"]]
        shares = sorted(Decimal(row["busy_share"]) for row in found)
        planned = sorted(Decimal(row["planned_gib"]) / Decimal(row["peak_gib"]) for row in found)
        spread = max(Decimal(row["spread"]) for row in found) * 100
        cells = [f"{rounded(str(low), 3)} to {rounded(str(high), 3)}" for low, *_, high in (shares, planned)]
        body.append([label, *cells, f"{rounded(str(spread), 1)} %"])
    return table(["", "GPU busy", "planned / peak memory", "largest spread of a visit's steps"], body)


# What a kernel does, by a part of its name; the first that fits.
KERNELS = {
    "attention": ("sdpa", "cudnn"),
    "products": ("gemm", "nvjet", "cutlass"),
    "additions to the fp32 sums": ("_accumulate", "_gather_add"),
    "AdamW": ("_adamw",),
    "gradients of activation and loss": ("_gradient_kernel",),
    "rounding to e4m3": ("quantize", "amax"),
    "MVUE's estimate": ("_mvue",),
}


def kernels() -> str:
    """The GPU's time in a step of LLaMA-3-8B with 16 blocks, by what it does; ms of the first visit."""
    found, visits = rows("models/llama-3-8b-16-layers-kernels"), rows("models/llama-3-8b-16-layers")
    spent = {(what, mode): Decimal(0) for what in KERNELS for mode in WHOLE_MODES}
    whole_step = {mode: Decimal(find(visits, mode=mode, visit="1")["busy_ms"]) for mode in WHOLE_MODES}
    # The file has a kernel where it takes 0.4 % of its own mode's step; here one bound holds for all of them.
    least = max(whole_step.values()) * 4 / 1000
    for row in found:
        for what, parts in KERNELS.items():
            if Decimal(row["ms"]) >= least and any(part in row["kernel"] for part in parts):
                spent[what, row["mode"]] += Decimal(row["ms"])
                break
    body = [[what, *(rounded(str(spent[what, mode]), 0) for mode in WHOLE_MODES)] for what in KERNELS]
    rest = {mode: whole_step[mode] - sum(spent[what, mode] for what in KERNELS) for mode in WHOLE_MODES}
    for label, times in ((f"other, and kernels of under {rounded(str(least), 1)} ms", rest), ("all", whole_step)):
        body.append([label, *(rounded(str(times[mode]), 0) for mode in WHOLE_MODES)])
    return table(["ms", *WHOLE_MODES.values()], body)


def peers() -> str:
    """Others beside ours in one run: training, then forward alone."""
    found, models = rows("peers"), ["llama-3-8b", "opt-13b", "opt-66b"]
    body = []
    for label, peer in PEERS:
        line = [label]
        for model in models:
            own = [row for row in found if row["model"] == model and row["peer"] == peer]
            parts = [find(own, **{"pass": part})["ratio"] for part in ("train", "forward")] if own else []
            line.append(", ".join(rounded(ratio, 3) for ratio in parts) or "-")
        body.append(line)
    return table(["training, forward", *models], body)


def memory() -> str:
    """Allocated bytes against dense, of the sparse linears and of the whole model."""
    body = []
    for name, backend in (("memory_models", "cuSPARSELt"), ("memory_models_cutlass", "`cutlass`")):
        found = rows(name)
        for form in ("2:4", "2:4 + 1.56 %", "2:4 + 6.25 %"):
            line = [f"{form}, {backend}"]
            for ratio in ("layers_ratio", "model_ratio"):
                line += [rounded(find(found, use=use, form=form)[ratio], 3) for use in ("training", "inference")]
            body.append(line)
    head = ["", "linears, training", "linears, inference", "model, training", "model, inference"]
    return table(head, body)


def adapters() -> str:
    """The share of the 2:4 block's speed that is left with adapters."""
    found = rows("adapters")
    body = []
    for model in ("opt-13b", "opt-30b", "opt-66b", "llama-3-8b"):
        line = [f"{model}, rank {next(row['rank'] for row in found if row['model'] == model)}"]
        for part in ("train", "forward"):
            row = find(found, **{"model": model, "pass": part})
            kept, flops, moved = (rounded(row[key], 3) for key in ("kept", "flop_bound", "byte_bound"))
            line.append(f"{kept} ({flops}, {moved})")
        body.append(line)
    return table(["", "training", "forward"], body)


def tensor_parallel() -> str:
    """Whole steps at TP 2."""
    found, body = [row for row in rows("parallel") if row["tensor_parallel"] == "2"], []
    for mode, overlap in (
        ("dense", "True"),
        ("paper", "True"),
        ("full", "True"),
        ("paper", "False"),
        ("full", "False"),
    ):
        line = [MODES[mode] + ("" if overlap == "True" else ", collectives of the 2:4 linears waited for")]
        for model in ("opt-13b", "opt-30b", "opt-66b"):
            own = [row for row in found if (row["model"], row["mode"], row["overlap"]) == (model, mode, overlap)]
            line.append(step_and_peak(own[0]) if own else "not run")
        body.append(line)
    return table(["", "OPT-13B", "OPT-30B", "OPT-66B"], body)


def step_and_peak(row: dict[str, str]) -> str:
    speed = f"{rounded(row['step_ms'], 0)} ms" if row["mode"] == "dense" else f"{rounded(row['ratio'], 2)} x"
    return f"{speed}, {rounded(row['peak_gib'], 1)} GiB"


def replicas() -> str:
    """One GPU and two replicas of OPT-13B."""
    found, body = rows("parallel"), []
    for mode in ("dense", "paper"):
        for size in ("1", "2"):
            row = find(found, model="opt-13b", mode=mode, tensor_parallel="1", data_parallel=size)
            sent = f"{rounded(row['data_sent_gib'], 2)} GiB, {rounded(row['reduce_ms'], 0)} ms" if size == "2" else "-"
            peak = f"{rounded(row['peak_gib'], 1)} GiB ({rounded(row['planned_gib'], 1)})"
            growth = rounded(str(Decimal(row["efficiency"]) * int(size)), 2)
            body.append([f"{MODES[mode]}, DP {size}", f"{rounded(row['step_ms'], 0)} ms", growth, sent, peak])
    return table(["", "step", "throughput, times one GPU's", "sent by a rank in a step", "peak (planner's)"], body)


TABLES: dict[str, Callable[[], str]] = {
    "whole": whole,
    "busy": busy,
    "kernels": kernels,
    "block": block,
    "peers": peers,
    "memory": memory,
    "adapters": adapters,
    "tensor_parallel": tensor_parallel,
    "replicas": replicas,
}


def rendered(text: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
