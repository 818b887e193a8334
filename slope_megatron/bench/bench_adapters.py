"""What low-rank adapters cost a 2:4 block: the speed that is kept, relative to the same block without them.

The rank is a share of the hidden size. Two bounds stand beside what is kept, both relative to the block's own time
without adapters:
    flop_bound    the adapters' products at the rate that dense products reach in the same run, and nothing else
    byte_bound    X read and Y written once more for each pair of products (and X and dY read once more for the
                  adapters' gradients) at the measured copy bandwidth, and nothing else
"""

import functools
import gc

from slope_megatron.bench.bench_block import timed_stacks
from slope_megatron.bench.common import bar_chart, copy_bandwidth, machine, print_table, rounded, write_csv
from slope_megatron.bench.models import MODELS, Model
from slope_megatron.bench.progress import add_budget, begin


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="models to time")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.56, 6.25], help="ranks, %% of the hidden size")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens T, in sequences of 2048")
    parser.add_argument("--blocks", type=int, default=2, help="blocks in a stack; times are per block")
    parser.add_argument("--accumulate", default="fp32", choices=("fp32", "bf16", "none"))
    parser.add_argument("--rounds", type=int, default=11, help="samples of each")
    parser.add_argument("--eager", action="store_true", help="launch from Python instead of replaying CUDA graphs")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV and the chart; default: the current one")


def rank_of(model: Model, share: float) -> int:
    return max(1, round(model.hidden * share / 100))


def adapter_work(model: Model, rank: int, tokens: int, train: bool) -> tuple[float, float]:
    """Floating-point operations, and bytes as in the file's docstring, that adapters add to a block."""
    widths = sum(rows + columns for rows, columns in model.linears().values())
    pairs = 3 if train else 1
    return pairs * 2.0 * tokens * rank * widths, pairs * 2.0 * tokens * widths


def dense_rate(model: Model, tokens: int) -> float:
    """Floating-point operations a ms of the run's dense forward and dgrad products."""
    from slope_megatron.bench.linears import DTYPE
    from slope_megatron.ops.choices import Key, Product, find

    flops, ms = 0.0, 0.0
    for rows, columns in model.linears().values():
        for key in (
            Key(Product.FORWARD, rows, columns, tokens, DTYPE),
            Key(Product.DGRAD, columns, rows, tokens, DTYPE),
        ):
            flops += 2.0 * rows * columns * tokens
            choice = find(key)
            if choice is None or choice.dense_ms is None:
                raise RuntimeError(f"{key} was not timed against the dense product: run the block once before")
            ms += choice.dense_ms
    return flops / ms


def model_rows(model: Model, arguments, bandwidth: float) -> list[dict]:
    from slope_megatron.bench.block import Stack
    from slope_megatron.bench.linears import MODES, WithAdapters
    from slope_megatron.ops.autotune import timing

    def stack(linear):
        return Stack(model, linear, arguments.blocks, arguments.tokens, arguments.accumulate)

    stacks = {"dense": stack(MODES["dense"]), "none": stack(MODES["paper"])}
    for share in arguments.shares:
        stacks[share] = stack(functools.partial(WithAdapters, rank=rank_of(model, share)))
    rows = []
    for name in ("train", "forward"):
        samples = timed_stacks(stacks, name, arguments)
        times = {label: timing.median(values) for label, values in samples.items()}
        for share in arguments.shares:
            flops, moved = adapter_work(model, rank_of(model, share), arguments.tokens, name == "train")
            pairs = [without / with_ for without, with_ in zip(samples["none"], samples[share], strict=True)]
            row = {
                "model": model.name,
                "pass": name,
                "tokens": arguments.tokens,
                "share": share,
                "rank": rank_of(model, share),
                "accumulate": arguments.accumulate if name == "train" else "",
                "dense_ms": times["dense"],
                "sparse_ms": times["none"],
                "adapters_ms": times[share],
                "kept": times["none"] / times[share],
                "spread": timing.spread(pairs),
                "flop_bound": times["none"] / (times["none"] + flops / dense_rate(model, arguments.tokens)),
                "byte_bound": times["none"] / (times["none"] + moved / bandwidth * 1e3),
                "ratio_to_dense": times["dense"] / times[share],
            }
            rows.append(rounded(row))
    return rows


def main(arguments) -> int:
    clock = begin(arguments)
    import torch

    bandwidth, rows = copy_bandwidth(), []
    for name in clock.within(arguments.models):
        rows += model_rows(MODELS[name], arguments, bandwidth)
        path = write_csv("adapters", rows, arguments.out)
        gc.collect()
        torch.cuda.empty_cache()
    skipped = ("tokens", "accumulate")
    print_table(rows, [column for column in rows[0] if column not in skipped])
    labels = [f"{row['model']} {row['pass']} {row['share']} %" for row in rows]
    series = {column: [row[column] for row in rows] for column in ("kept", "flop_bound", "byte_bound")}
    bar_chart("adapters", labels, series, machine(), arguments.out, "speed kept (1: without adapters)")
    print(f"wrote {path}")
    return 0
