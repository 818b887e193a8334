"""Allocated bytes of one block and of whole models, dense and 2:4, with and without adapters: where they go.

Training is bf16 with fp32 gradient accumulation and AdamW on fp32 masters; inference holds what the forward product
reads. One block is allocated and charged item by item (holdings.py). Whole models are extrapolated from it: each 2:4
weight costs what the block's cost, adapters theirs, and all else (embeddings, output layer, biases, norms, and the
first linear, which stays dense) 18 bytes a parameter in training and 2 for inference, dense in every form.
Activations are of one micro-batch without recomputation, attention by flash; they are listed apart: `ratio` is of the
state that stays from step to step.
"""

import dataclasses
import functools
import gc
from pathlib import Path

from slope_megatron.bench.bench_adapters import rank_of
from slope_megatron.bench.common import machine, print_table, rounded, write_csv
from slope_megatron.bench.models import MODELS, Model
from slope_megatron.bench.progress import add_budget, begin
from slope_megatron.config import shipped

GIB = 2**30
# Bytes of a parameter that is not 2:4.
DENSE_BYTES = {"training": 2 + 4 + 12, "inference": 2}


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="models to account for")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.56, 6.25], help="ranks, %% of the hidden size")
    parser.add_argument("--backend", default="auto", help="backend of the 2:4 operands (--slope-backend)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens T, in sequences of 2048")
    parser.add_argument("--no-activations", action="store_true", help="state alone")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV and the chart; default: the current one")


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to hold a model; `share`: rank of the adapters in % of the hidden size."""

    sparse: bool
    share: float = 0.0

    def __str__(self) -> str:
        if not self.sparse:
            return "dense"
        return f"2:4 + {self.share} %" if self.share else "2:4"


def block_ledger(model: Model, form: Form, use: str, arguments):
    """Every linear of one block, one after the other."""
    from slope_megatron.bench.holdings import Ledger, dense_linear, sparse_linear

    ledger, train = Ledger(), use == "training"
    rank = rank_of(model, form.share) if form.share else 0
    for rows, columns in model.linears().values():
        if form.sparse:
            sparse_linear(ledger, rows, columns, rank, train, arguments.backend, arguments.tokens)
        else:
            dense_linear(ledger, rows, columns, train)
        gc.collect()
    return ledger


def whole_model(model: Model, form: Form, ledger, use: str) -> float:
    """Bytes of the whole model's state."""
    from slope_megatron.config import Config, ModelConfig, SlopeConfig
    from slope_megatron.config.fields import load_yaml
    from slope_megatron.models.counts import count, model_tensors
    from slope_megatron.models.shapes import own_rows

    architecture = ModelConfig(
        **load_yaml(shipped.folder("models") / f"{model.name}.yaml", {"model": ModelConfig})["model"]
    )
    config = Config(model=architecture, slope=SlopeConfig(adapter_rank=rank_of(model, form.share) if form.share else 0))
    counts = count(model_tensors(config, own_rows(architecture)), 1)
    if not form.sparse:
        return (counts.packed_dense + counts.other) * DENSE_BYTES[use]
    layers = sum(allocated for item, (allocated, _) in ledger.items.items() if not item.startswith("adapters"))
    per_weight = layers / sum(rows * columns for rows, columns in model.linears().values())
    return counts.packed_dense * per_weight + (counts.other + counts.adapters) * DENSE_BYTES[use]


def activation_rows(model: Model, arguments) -> list[dict]:
    """Of one block; backward's and inference's own are beside what is kept."""
    from slope_megatron.bench.holdings import activations
    from slope_megatron.bench.linears import MODES, LinearMaker, WithAdapters

    forms: dict[Form, LinearMaker] = {Form(False): MODES["dense"], Form(True): MODES["paper"]}
    for share in arguments.shares:
        forms[Form(True, share)] = functools.partial(WithAdapters, rank=rank_of(model, share))
    rows = []
    for form, linear in forms.items():
        kept, counted, peak = activations(model, linear, arguments.tokens)
        for use, item, allocated, formula in (
            ("training", "activations kept for backward", kept, counted),
            ("inference", "activations at their peak", peak, ""),
        ):
            rows.append(item_row(model, form, use, item, allocated, formula))
        gc.collect()
    return rows


def item_row(model: Model, form: Form, use: str, item: str, allocated: float, counted) -> dict:
    weights = sum(rows * columns for rows, columns in model.linears().values())
    return {
        "model": model.name,
        "use": use,
        "form": str(form),
        "item": item,
        "allocated": int(allocated),
        "counted": int(counted) if counted != "" else "",
        "bytes_per_weight": allocated / weights,
    }


def model_tables(model: Model, arguments) -> tuple[list[dict], list[dict]]:
    """Rows of the items, and rows of the totals with their ratios."""
    items, totals = [], []
    for use in ("training", "inference"):
        dense: dict[str, float] = {}
        for form in (Form(False), Form(True), *(Form(True, share) for share in arguments.shares)):
            ledger = block_ledger(model, form, use, arguments)
            items += [item_row(model, form, use, item, *pair) for item, pair in ledger.items.items()]
            found = {"block": ledger.total, "model": whole_model(model, form, ledger, use)}
            dense = dense or found
            totals.append(
                {
                    "model": model.name,
                    "use": use,
                    "form": str(form),
                    "backend": arguments.backend if form.sparse else "",
                    "block_gib": found["block"] / GIB,
                    "layers_ratio": found["block"] / dense["block"],
                    "model_gib": found["model"] / GIB,
                    "model_ratio": found["model"] / dense["model"],
                    "worst_difference": max(abs(a - c) / c for a, c in ledger.items.values() if c),
                }
            )
    if not arguments.no_activations:
        items += activation_rows(model, arguments)
    return [rounded(item) for item in items], [rounded(total) for total in totals]


def stacked_chart(items: list[dict], model: str, folder) -> None:
    """`memory.png`: bytes a weight of one model's block by item, training and inference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [item for item in items if item["model"] == model and "activations" not in item["item"]]
    bars = list(dict.fromkeys((item["use"], item["form"]) for item in shown))
    figure, axes = plt.subplots(figsize=(10, 5))
    bottoms = dict.fromkeys(bars, 0.0)
    for name in dict.fromkeys(item["item"] for item in shown):
        heights = {(item["use"], item["form"]): item["bytes_per_weight"] for item in shown if item["item"] == name}
        values = [heights.get(bar, 0.0) for bar in bars]
        axes.bar(range(len(bars)), values, bottom=[bottoms[bar] for bar in bars], label=name)
        bottoms = {bar: bottoms[bar] + value for bar, value in zip(bars, values, strict=True)}
    axes.set_xticks(range(len(bars)), [f"{use}\n{form}" for use, form in bars], fontsize=8)
    axes.set_ylabel("bytes a dense weight")
    axes.set_title(f"{model}, linears of one block; {machine()}", fontsize=9)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1.0), loc="upper left")
    figure.tight_layout()
    figure.savefig(Path(folder or ".") / "memory.png", dpi=110)
    plt.close(figure)


def main(arguments) -> int:
    clock = begin(arguments)
    import torch

    # Workspaces of the libraries are allocated on first use: not what is counted here.
    torch.mm(*(torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2)))
    items: list[dict] = []
    totals: list[dict] = []
    for name in clock.within(arguments.models):
        more_items, more_totals = model_tables(MODELS[name], arguments)
        items, totals = items + more_items, totals + more_totals
        path = write_csv("memory", items, arguments.out)
        write_csv("memory_models", totals, arguments.out)
        torch.cuda.empty_cache()
    last = items[-1]["model"]
    print_table([item for item in items if item["model"] == last], list(items[0]))
    print_table(totals, list(totals[0]))
    stacked_chart(items, last, arguments.out)
    print(f"wrote {path} and memory_models.csv")
    return 0
