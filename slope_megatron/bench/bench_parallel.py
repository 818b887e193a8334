"""Training steps on several GPUs of one machine, 2:4 against dense: tensor parallelism, and replicas from one up.

    tensor    blocks of each model at TP = all GPUs, with sequence parallelism: times of a step and of its parts,
              memory beside the planner's, bytes that a rank sends; and once more with every collective of the 2:4
              linears waited for where it starts, which tells what overlapping gives
    data      one model at TP 1 on 1, 2, 4, ... GPUs, the same work for each: packed gradients against dense ones

One command: it starts a process a GPU itself. Dense and 2:4 engines alternate step by step in the same processes. The
CSV is written anew after every round; what is under way, and which kernels are chosen, is said on stderr.

`--share-gpus 4` measures memory and bytes sent of a layout for which there are too few GPUs (parallel_shared.csv).
`--cpu-ranks 2 --sequence 32 --tokens 128 --rounds 3` tries it on a CPU, with a tiny model: such times say nothing.
"""

import dataclasses
import os
import statistics
import tempfile
import threading
from pathlib import Path

from torch.multiprocessing.spawn import ProcessException

from slope_megatron.bench.common import machine, print_table, rounded, write_csv
from slope_megatron.bench.models import MODELS, TINY
from slope_megatron.bench.progress import Clock, add_budget
from slope_megatron.bench.ranks import run_ranks
from slope_megatron.bench.work import Work

MEASURED = ("step", "forward_backward", "reduce", "update")
KNOWN = {**MODELS, TINY.name: TINY}
ON_CPU = "ranks on a CPU over gloo: these times say nothing"
SHARED = "ranks share GPUs: memory and bytes are as on GPUs of their own, these times say nothing"


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--gpus", type=int, help="GPUs to use; default: all of this machine")
    add("--cpu-ranks", type=int, help="so many ranks on the CPU instead, to try the command: its times say nothing")
    add("--share-gpus", type=int, help="so many ranks, several on a GPU: for memory and bytes sent; no times")
    add("--parts", nargs="+", default=["tensor", "data"], choices=("tensor", "data"), help="what to measure")
    add("--models", nargs="+", choices=list(KNOWN), help="of the part `tensor`; default: opt-13b opt-30b opt-66b")
    add("--data-model", choices=list(KNOWN), help="of the part `data`; default: opt-13b")
    add(
        "--modes", nargs="+", default=["dense", "paper", "full"], choices=modes(), help="dense, and modes of 2:4 layers"
    )
    add("--blocks", type=int, default=4, help="blocks of the part `tensor`")
    add("--data-blocks", type=int, default=2, help="blocks of the part `data`")
    add("--tokens", type=int, default=8192, help="tokens of a micro-batch")
    add("--sequence", type=int, default=2048, help="tokens of a sequence")
    add("--micro-batches", type=int, default=4, help="micro-batches of a step on each replica")
    add("--vocabulary", type=int, default=50272, help="entries of the vocabulary")
    add(
        "--grad-reduce-dtype",
        default="auto",
        choices=choices("parallel", "grad_reduce_dtype"),
        help="type in which gradients are summed over the replicas",
    )
    add("--rounds", type=int, default=9, help="samples of each")
    add_budget(parser)
    add("--out", help="folder for the CSV and the chart; default: the current one")


def choices(section: str, key: str) -> tuple:
    """What `slope pretrain` offers for a setting."""
    from slope_megatron.config.reader import SECTIONS

    (field,) = (field for field in dataclasses.fields(SECTIONS[section][0]) if field.name == key)
    return field.metadata["choices"]


def modes() -> list[str]:
    """`dense`, and those of 2:4 layers."""
    return ["dense", *choices("slope", "mode")]


@dataclasses.dataclass(frozen=True)
class Start:
    """So many ranks, and the fields of their `Work`."""

    world: int
    settings: dict

    def __str__(self) -> str:
        return f"{self.settings['model'].name}, {self.world} ranks at TP {self.settings['tensor_parallel']}"


def starts(arguments, gpus: int) -> list[Start]:
    """What is started, one after the other."""
    settings = ("tokens", "sequence", "micro_batches", "vocabulary", "grad_reduce_dtype", "rounds")
    common = {name: getattr(arguments, name) for name in settings}
    # The others are compared with dense: it must be there when a budget ends the rest.
    common |= {"modes": tuple(sorted(arguments.modes, key=lambda mode: mode != "dense"))}
    tiny = [TINY.name] if arguments.cpu_ranks else None
    found = []
    if "tensor" in arguments.parts and gpus > 1:
        own = {"blocks": arguments.blocks, "tensor_parallel": gpus, "waiting": not arguments.share_gpus}
        names = arguments.models or tiny or ["opt-13b", "opt-30b", "opt-66b"]
        found += [Start(gpus, common | own | {"model": KNOWN[name]}) for name in names]
    if "data" in arguments.parts:
        own = {"model": KNOWN[arguments.data_model or (TINY.name if tiny else "opt-13b")]}
        own |= {"blocks": arguments.data_blocks, "tensor_parallel": 1, "waiting": False}
        replicas = [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]
        found += [Start(count, common | own) for count in replicas]
    return found


def compile_kernels(clock: Clock) -> None:
    """Our own kernels, which the first product would wait for, while ranks start and dense engines are built."""
    import torch

    from slope_kernels import cutlass, packed_wgrad
    from slope_megatron.ops.operands import cutlass as library

    reason = cutlass.unsupported()
    clock.say(f"our own kernels: {reason or 'compiled beside all else, a minute or two unless they are there already'}")
    if reason is None:
        found = library.kernels(torch.bfloat16) + library.packing_kernels(torch.bfloat16)
        clock.say(f"our own kernels: {len(found)} of {len(cutlass.KERNELS) + len(packed_wgrad.KERNELS)} are there")


def finished(row: dict, dense: dict, one: dict | None) -> dict:
    """A CSV row: medians and spread instead of samples, times dense, and of one GPU's throughput."""
    columns = {name: value for name, value in row.items() if name != "samples"}
    for part in MEASURED:
        columns[f"{part}_ms"] = median(row, part)
    columns["rounds"] = len(row["samples"])
    columns["spread"] = spread([sample["step"] for sample in row["samples"]])
    columns["ratio"] = median(dense, "step") / median(row, "step")
    pairs = zip(dense["samples"], row["samples"], strict=True)
    columns["ratio_spread"] = spread([first["step"] / second["step"] for first, second in pairs])
    tokens = row["tokens"] * row["micro_batches"] * row["data_parallel"]
    columns["tokens_per_second"] = tokens / median(row, "step") * 1e3
    columns["efficiency"] = median(one, "step") / median(row, "step") if one else ""
    return rounded(columns)


def median(row: dict, part: str) -> float:
    return statistics.median(sample[part] for sample in row["samples"])


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def untimed(rows: list[dict]) -> list[dict]:
    """CSV rows of ranks that share GPUs."""
    return [rounded({name: value for name, value in row.items() if name != "samples"}) for row in rows]


def finish(rows: list[dict]) -> list[dict]:
    """CSV rows; each is compared with the dense row of its layout, and with its own kind on one GPU."""

    def layout(row):
        return row["model"], row["tensor_parallel"], row["data_parallel"]

    dense = {layout(row): row for row in rows if row["mode"] == "dense"}
    single = {row["mode"]: row for row in rows if row["tensor_parallel"] == row["data_parallel"] == 1}
    return [
        finished(row, dense[layout(row)], single.get(row["mode"]) if row["tensor_parallel"] == 1 else None)
        for row in rows
    ]


def chart(rows: list[dict], folder: Path, title: str) -> Path:
    """`parallel.png`: times dense under tensor parallelism, and throughput over replicas."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    bars = [row for row in rows if row["tensor_parallel"] > 1 and row["mode"] != "dense"]
    labels = [f"{row['model']} {row['mode']}{'' if row['overlap'] else ', waiting'}" for row in bars]
    left.bar(range(len(bars)), [row["ratio"] for row in bars], 0.7)
    left.set_xticks(range(len(bars)), labels, rotation=60, ha="right", fontsize=8)
    left.axhline(1.0, color="black", linewidth=0.8)
    left.set_ylabel("step, times dense")
    left.set_title("tensor and sequence parallel", fontsize=9)
    lines = [row for row in rows if row["tensor_parallel"] == 1]
    for mode in dict.fromkeys(row["mode"] for row in lines):
        mine = sorted((row["data_parallel"], row["tokens_per_second"]) for row in lines if row["mode"] == mode)
        right.plot(*zip(*mine, strict=True), marker="o", label=mode)
        right.plot(
            [count for count, _ in mine], [mine[0][1] * count / mine[0][0] for count, _ in mine], ":", color="gray"
        )
    if lines:
        right.legend(fontsize=8)
        right.set_xticks(sorted({row["data_parallel"] for row in lines}))
    right.set_xlabel("replicas (dotted: linear)")
    right.set_ylabel("tokens/s")
    right.set_title("data parallel, ZeRO-1", fontsize=9)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    path = folder / "parallel.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def ranks_wanted(arguments) -> int:
    """GPUs to use, or ranks on the CPU.

    Raises:
        ValueError: what was asked for does not fit this machine or cannot be compared.
    """
    import torch

    from slope_megatron.bench.common import require_gpu

    if "dense" not in arguments.modes:
        raise ValueError(
            f"--modes is {' '.join(arguments.modes)}: dense must be among them, the others are compared with it"
        )
    if arguments.rounds < 2:
        raise ValueError(f"--rounds is {arguments.rounds}: a spread needs 2 at least")
    asked = {"--gpus": arguments.gpus, "--share-gpus": arguments.share_gpus, "--cpu-ranks": arguments.cpu_ranks}
    given = [f"{flag} is {count}" for flag, count in asked.items() if count]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")
    if arguments.cpu_ranks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the ranks
        return arguments.cpu_ranks
    require_gpu()
    found = torch.cuda.device_count()
    if arguments.gpus and arguments.gpus > found:
        raise ValueError(f"--gpus is {arguments.gpus} and this machine has {found}: give at most {found}")
    if arguments.share_gpus:
        if arguments.share_gpus <= found:
            raise ValueError(f"--share-gpus is {arguments.share_gpus} and this machine has {found}: use --gpus")
        # Imported late: it brings Megatron with it.
        from slope_megatron.training.parallel import SHARE_GPUS

        os.environ[SHARE_GPUS] = "1"  # for the ranks
    return arguments.share_gpus or arguments.gpus or found


def main(arguments) -> int:
    count = ranks_wanted(arguments)
    clock, note, name, table = Clock(arguments.seconds), "", "parallel", finish
    if arguments.cpu_ranks:
        note = ON_CPU
    if arguments.share_gpus:
        note, name, table = SHARED, "parallel_shared", untimed
    title = f"{note}{'; ' if note else ''}{machine()}"
    clock.say(f"{title} ranks={count}")
    if not arguments.cpu_ranks:
        threading.Thread(target=compile_kernels, args=(clock,), daemon=True).start()
    folder = Path(arguments.out or ".")
    before: list[dict] = []
    rows: list[dict] = []
    failed = []

    def keep(news: list[dict]) -> None:
        rows[:] = [*before, *news]
        write_csv(name, table(rows), folder, note)

    with tempfile.TemporaryDirectory() as shared:
        for start in clock.within(starts(arguments, count)):
            work = Work(**start.settings, folder=shared, seconds=clock.budget, started=clock.started)
            try:
                run_ranks(start.world, work, keep)
            except ProcessException as error:
                clock.say(f"{start}: failed: {error}")
                failed.append(str(start))
            for row in table(rows)[len(before) :]:
                waits = "" if row["overlap"] else ", waiting"
                found = f"{row['step_ms']} ms a step, {row['ratio']} times dense" if "ratio" in row else "measured"
                clock.say(f"  {row['mode']}{waits}: {found}")
            before = list(rows)
    report(table(rows), folder / f"{name}.csv", title)
    if note:
        print(note)
    if failed:
        print(f"failed: {'; '.join(failed)}")
    return 1 if failed or not rows else 0


def report(done: list[dict], path: Path, title: str) -> None:
    """Tables on stdout, and the chart beside the CSV."""
    if not done:
        print("nothing was measured")
        return
    timed = "ratio" in done[0]
    if timed:
        columns = "model mode overlap tensor_parallel data_parallel rounds step_ms spread ratio ratio_spread"
        print_table(done, columns.split())
        columns = "model mode tensor_parallel data_parallel forward_backward_ms reduce_ms update_ms efficiency"
        print_table(done, columns.split())
    columns = (
        "model mode tensor_parallel data_parallel state_gib peak_gib planned_gib tensor_sent_gib tensor_formula_gib"
    )
    print_table(done, [*columns.split(), "data_sent_gib", "data_formula_gib"])
    if timed:
        chart(done, path.parent, title)
    print(f"wrote {path}")
