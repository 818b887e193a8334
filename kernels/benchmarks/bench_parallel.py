"""Training steps on several GPUs of one machine, 2:4 against dense: tensor parallelism, and replicas from one up.

    tensor    blocks of each model at TP = all GPUs, with sequence parallelism: times of a step and of its parts,
              memory beside the planner's, bytes that a rank sends; and once more with every collective of the 2:4
              linears waited for where it starts, which tells what overlapping gives
    data      one model at TP 1 on 1, 2, 4, ... GPUs, the same work for each: packed gradients against dense ones

One command: it starts a process a GPU itself. Dense and 2:4 engines alternate step by step in the same processes.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

from common import RESULTS, machine, print_table, rounded, say, write_csv
from models import MODELS

MEASURED = ("step", "forward_backward", "reduce", "update")


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--gpus", type=int, help="GPUs to use; default: all of this machine")
    add("--parts", nargs="+", default=["tensor", "data"], choices=("tensor", "data"), help="what to measure")
    add("--models", nargs="+", default=["opt-13b", "opt-30b", "opt-66b"], choices=list(MODELS))
    add("--data-model", default="opt-13b", choices=list(MODELS), help="model of the part `data`")
    add(
        "--modes", nargs="+", default=["dense", "paper", "full"], choices=modes(), help="dense, and modes of 2:4 layers"
    )
    add("--blocks", type=int, default=4, help="blocks of the part `tensor`")
    add("--data-blocks", type=int, default=2, help="blocks of the part `data`")
    add("--tokens", type=int, default=8192, help="tokens of a micro-batch, in sequences of 2048")
    add("--micro-batches", type=int, default=4, help="micro-batches of a step on each replica")
    add("--vocabulary", type=int, default=50272, help="entries of the vocabulary")
    add(
        "--grad-reduce-dtype",
        default="auto",
        choices=choices("parallel", "grad_reduce_dtype"),
        help="type in which gradients are summed over the replicas",
    )
    add("--rounds", type=int, default=9, help="samples of each")
    add("--out", help="folder for the CSV and the chart; default: kernels/benchmarks/results")


def choices(section: str, key: str) -> tuple:
    """What `slope pretrain` offers for a setting."""
    from slope_megatron.config.reader import SECTIONS

    return SECTIONS[section][0].__dataclass_fields__[key].metadata["choices"]


def modes() -> list[str]:
    """`dense`, and those of 2:4 layers."""
    return ["dense", *choices("slope", "mode")]


def starts(arguments, gpus: int) -> list[tuple[int, dict]]:
    """Numbers of ranks to start, each with what they are to do."""
    common = {name: getattr(arguments, name) for name in ("tokens", "micro_batches", "vocabulary", "rounds")}
    common["grad_reduce_dtype"] = arguments.grad_reduce_dtype
    common |= {"modes": tuple(arguments.modes), "sequence": 2048}
    found = []
    if "tensor" in arguments.parts and gpus > 1:
        own = {"blocks": arguments.blocks, "tensor_parallel": gpus, "waiting": True}
        found += [(gpus, common | own | {"model": MODELS[name]}) for name in arguments.models]
    if "data" in arguments.parts:
        own = {"model": MODELS[arguments.data_model], "blocks": arguments.data_blocks}
        own |= {"tensor_parallel": 1, "waiting": False}
        replicas = [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]
        found += [(count, common | own) for count in replicas]
    return found


def play_rank(rank: int, world: int, port: int, work) -> None:
    """One spawned process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Kernels start in the order in which they were asked for: a collective before the product that covers it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    from parallel import play

    play(work)


def run_ranks(world: int, settings: dict, folder: str) -> list[dict]:
    """Start `world` ranks, wait for them, and take their rows."""
    import socket

    import torch.multiprocessing
    from parallel import Work

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(play_rank, args=(world, port, Work(**settings, folder=folder)), nprocs=world)
    return json.loads(Path(folder, "rows.json").read_text())


def finished(row: dict, dense: dict, one: dict | None) -> dict:
    """A CSV row: medians and spread in the place of samples, times dense, and of one GPU's throughput."""
    columns = {name: value for name, value in row.items() if name != "samples"}
    for part in MEASURED:
        columns[f"{part}_ms"] = median(row, part)
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


def chart(rows: list[dict], folder: Path) -> Path:
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
    right.set_xlabel("replicas (dotted: linear)")
    right.set_ylabel("tokens/s")
    right.set_title("data parallel, ZeRO-1", fontsize=9)
    figure.suptitle(machine(), fontsize=8)
    figure.tight_layout()
    path = folder / "parallel.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(arguments) -> int:
    import torch
    from common import require_gpu

    require_gpu()
    found = torch.cuda.device_count()
    gpus = arguments.gpus or found
    if gpus > found:
        raise ValueError(f"--gpus is {gpus} and this machine has {found}: give at most {found}")
    if "dense" not in arguments.modes:
        raise ValueError(
            f"--modes is {' '.join(arguments.modes)}: dense must be among them, the others are compared with it"
        )
    say(f"{machine()} gpus={gpus}")
    folder = Path(arguments.out or RESULTS)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as shared:
        for world, settings in starts(arguments, gpus):
            say(f"{world} ranks: {settings['model'].name} at TP {settings['tensor_parallel']}")
            news = run_ranks(world, settings, shared)
            rows += news
            done = finish(rows)
            for row in done[-len(news) :]:
                waits = "" if row["overlap"] else ", waiting"
                say(f"  {row['mode']}{waits}: {row['step_ms']} ms a step, {row['ratio']} times dense")
            path = write_csv("parallel", done, folder)
    columns = "model mode overlap tensor_parallel data_parallel step_ms spread ratio ratio_spread"
    print_table(done, columns.split())
    columns = "model mode tensor_parallel data_parallel forward_backward_ms reduce_ms update_ms efficiency"
    print_table(done, columns.split())
    columns = "mode data_parallel state_gib peak_gib planned_gib tensor_sent_gib tensor_formula_gib"
    print_table(done, [*columns.split(), "data_sent_gib", "data_formula_gib"])
    chart(done, folder)
    print(f"wrote {path}")
    return 0
