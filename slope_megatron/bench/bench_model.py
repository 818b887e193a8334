"""Whole models as `slope pretrain` trains them, dense beside 2:4, on synthetic batches and one GPU.

The trainer's own engines are built, timed and freed one after the other, there and back (A B C C B A), so that a
machine that slows down meanwhile does so for all; each visit has a row. Steps are timed as the trainer takes them, from
fetching batches to the refresh. Some columns:

    ratio                   the mode's tokens/s by dense's, each the mean of the visits
    mfu, mfu_actual         as `slope pretrain` counts them: all products as if dense, and what sparse kernels multiply
    busy_ms, busy_share     time of a step in which the GPU works (torch.profiler, a few steps after the timed ones),
                            and its share of step_ms. Which kernels they are is in model_kernels.csv
    clock_mhz, watts, celsius
                            of the GPU at the end of those steps
    linears_gib             weights, patterns, operands, gradients and optimizer of the 2:4 linears (dense: of the same
                            ones); counted_gib: of the whole model, as `slope pretrain` counts them
    state_gib, peak_gib     allocated between steps, and at the highest from the second step on; planned_gib: the
                            latter by `slope plan`
    left_mib                what stays allocated when the engine is freed: libraries' workspaces, on the first visit
    launch                  whether steps were replayed from CUDA graphs (--cuda-graphs)
    start_s                 from building to the end of the first step

dense-fp8 has dense linears in e4m3, those that are 2:4 in fp8: a mode of this comparison, none of `slope pretrain`.
`--shard-of 8` times rank 0 of 8 tensor-parallel ones with sequence parallelism: its shapes, without the collectives,
which this GPU has nobody for; losses mean nothing then. `--cpu --model tiny` tries the command: such times say nothing.
"""

import dataclasses
import os
import statistics
import warnings
from pathlib import Path

from slope_megatron.bench.common import machine, print_table, rounded, write_csv
from slope_megatron.bench.models import TINY, model_names
from slope_megatron.bench.progress import add_budget, begin
from slope_megatron.bench.work import ModelWork
from slope_megatron.config import shipped
from slope_megatron.config.methods import BASELINES

MODES = ("dense", "dense-fp8", "paper", "full", "fp8")
MICRO_BATCH_TOKENS = 8192
ON_CPU = "on a CPU: these times say nothing"


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--model", default="opt-2.6b", choices=model_names(), help="model to time")
    add("--layers", type=int, help="blocks, where all of them do not fit; default: the model's")
    add("--modes", nargs="+", default=list(MODES), choices=(*MODES, *BASELINES), help="engines to time")
    add("--shard-of", type=int, default=1, choices=(1, 2, 4, 8), help="tensor-parallel ranks, of which one is timed")
    add("--adapter-rank", default="0", help="of the 2:4 modes, as --slope-adapter-rank; they train from the first step")
    add("--cuda-graphs", default="auto", choices=("auto", "on", "off"), help="as in `slope pretrain`")
    add("--sequence", type=int, help="tokens of a sample; default: 2048, or the model's positions if they are fewer")
    add("--micro-batch", type=int, help="samples of a micro-batch; default: 8,192 tokens' worth")
    add("--micro-batches", type=int, default=4, help="micro-batches of a step")
    add("--steps", type=int, default=10, help="timed steps of each visit")
    add("--warmup", type=int, default=4, help="steps before them: kernels are compiled, chosen and captured")
    add("--profiled", type=int, default=3, help="steps after them for busy_ms; 0: none")
    add("--cpu", action="store_true", help="try the command on the CPU: its times say nothing")
    add_budget(parser)
    add("--out", help="folder for the CSV and the chart; default: the current one")


def work_of(arguments) -> ModelWork:
    """
    Raises:
        ValueError: flags that do not go together, or too few steps for a spread.
    """
    model = TINY.architecture if arguments.model == TINY.name else shipped.model(arguments.model)
    layers = arguments.layers
    if layers is not None and not 1 <= layers <= model.num_layers:
        raise ValueError(f"--layers is {layers}: {arguments.model} has {model.num_layers}; give 1 to that many")
    for flag, least in (("steps", 2), ("warmup", 2), ("profiled", 0), ("micro_batches", 1)):
        if getattr(arguments, flag) < least:
            raise ValueError(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}: it must be at least {least}")
    sequence = arguments.sequence or min(2048, model.max_positions or 2048)
    return ModelWork(
        name=arguments.model,
        model=dataclasses.replace(model, num_layers=layers or model.num_layers),
        whole_depth=model.num_layers,
        shard_of=arguments.shard_of,
        sequence=sequence,
        micro_batch=arguments.micro_batch or max(1, MICRO_BATCH_TOKENS // sequence),
        micro_batches=arguments.micro_batches,
        steps=arguments.steps,
        warmup=arguments.warmup,
        profiled=0 if arguments.cpu else arguments.profiled,
        adapter_rank=arguments.adapter_rank,
        cuda_graphs=arguments.cuda_graphs,
    )


def prepare_environment(work: ModelWork) -> None:
    """As `slope pretrain` does: before the frameworks load."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # Profiling once more while graphs live: see torch's profiler on CUPTI.
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    if work.shard_of > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def finish(rows: list[dict]) -> list[dict]:
    """CSV rows: each visit's own figures, and how its mode compares with dense."""
    speeds: dict[str, list[float]] = {}
    for row in rows:
        speeds.setdefault(row["mode"], []).append(row["tokens_per_second"])
    means = {mode: statistics.fmean(values) for mode, values in speeds.items()}
    done = []
    for row in rows:
        own = {name: value for name, value in row.items() if name != "kernels"}
        own["ratio"] = means[row["mode"]] / means["dense"] if "dense" in means else ""
        done.append(rounded(own))
    return done


def kernels(rows: list[dict]) -> list[dict]:
    """CSV rows of the visits' kernels, those first that take the longest."""
    found = []
    for row in rows:
        for name, (spent, launches) in sorted(row["kernels"].items(), key=lambda item: -item[1][0]):
            own = {"mode": row["mode"], "visit": row["visit"], "ms": spent, "share": spent / row["busy_ms"]}
            found.append(rounded(own | {"launches": launches, "kernel": name}))
    return found


def chart(rows: list[dict], folder, title: str) -> Path:
    """`model.png`: tokens/s and, of a GPU, peak memory of each mode; a bar a visit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    panels = {"tokens_per_second": "tokens/s"}
    if rows[0]["peak_gib"]:
        panels["peak_gib"] = "peak memory, GiB"
    figure, every = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axes, (column, measure) in zip(every[0], panels.items(), strict=True):
        for visit, label, hatch in ((1, "there", ""), (2, "and back", "//")):
            found = {row["mode"]: row for row in rows if row["visit"] == visit}
            at = [modes.index(mode) + 0.4 * (visit - 1) for mode in found]
            bars = axes.bar(
                at, [row[column] for row in found.values()], 0.4, label=label, hatch=hatch, edgecolor="white"
            )
            if visit == 1 and column == "tokens_per_second":
                axes.bar_label(bars, [row["ratio"] and f"{row['ratio']:.2f} x" for row in found.values()], fontsize=8)
        axes.set_xticks([index + 0.2 for index in range(len(modes))], modes)
        axes.set_ylabel(measure)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=7, wrap=True)
    path = Path(folder or ".") / "model.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(arguments) -> int:
    work = work_of(arguments)
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare_environment(work)
    clock = begin(arguments, gpu=not arguments.cpu)
    note = "; ".join(filter(None, (ON_CPU if arguments.cpu else "", work.note())))
    clock.say(note)
    from slope_megatron.integrations import cpu_host

    cpu_host.prepare()
    from slope_megatron.bench.model import visits

    rows: list[dict] = []
    failed: list[str] = []
    for news in visits(arguments.modes, work, clock, failed):
        rows.append(news)
        path = write_csv("model", finish(rows), arguments.out, note)
        if every := kernels(rows):
            write_csv("model_kernels", every, arguments.out, note)
        last = finish(rows)[-1]
        clock.say(f"{last['step_ms']} ms a step, {last['tokens_per_second']} tokens/s, {last['ratio']} times dense")
    if not rows:
        print("nothing was measured")
        return 1
    done = finish(rows)
    columns = "mode visit launch step_ms spread tokens_per_second ratio mfu mfu_actual busy_share peak_gib planned_gib"
    print_table(done, columns.split())
    chart(done, arguments.out, f"{note}; {machine()}")
    print(f"wrote {path}")
    if failed:
        print(f"failed: {' '.join(failed)}")
    return 1 if failed else 0
