"""Whole transformer blocks, each mode against dense, training and forward alone.

All are built from one description (block.py, linears.py) and alternate in one run. `ceiling` is the ratio that the same
run's GEMM times allow if all else took as long as in the dense block; `reached` is the share of that gain which is
there. `floor_ms` is the time that the sparse block's weights, gradients and linears' inputs and outputs take at the
machine's measured copy bandwidth, each moved once.

`--adapters 1.56 6.25` adds `paper` blocks with low-rank adapters, their ranks in % of the width: `kept` is the speed
relative to `paper` alone, `flop_bound` and `byte_bound` what it could be at most (adapters.py).
"""

import functools
import gc

from slope_megatron.bench.adapters import kept_speed, mode_of, rank_of
from slope_megatron.bench.common import bar_chart, copy_bandwidth, machine, print_table, rounded, sparse_peak, write_csv
from slope_megatron.bench.models import MODELS, Model
from slope_megatron.bench.progress import add_budget, begin


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="models to time")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens T, in sequences of 2048")
    parser.add_argument("--blocks", type=int, default=2, help="blocks in a stack; times are per block")
    parser.add_argument("--modes", nargs="+", default=["paper"], help="modes of linears.py to time against dense")
    parser.add_argument("--adapters", nargs="+", type=float, default=[], help="ranks of adapters, %% of the width")
    parser.add_argument("--accumulate", nargs="+", default=["fp32"], choices=("fp32", "bf16", "none"))
    parser.add_argument("--rounds", type=int, default=11, help="samples of each")
    parser.add_argument("--eager", action="store_true", help="launch from Python instead of replaying CUDA graphs")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV and the chart; default: the current one")


def gemm_gain(model: Model, mode: str, tokens: int, train: bool) -> tuple[float, float]:
    """ms a block that the chosen products save over dense ones, and all products' flops, forward (and backward)."""
    from slope_megatron.bench.linears import DTYPE, SPARSE_PRODUCTS
    from slope_megatron.ops import choices

    gain, flops = 0.0, 0.0
    for rows, columns in model.linears().values():
        one = 2 * rows * columns * tokens
        flops += 3 * one if train else one
        for kind in SPARSE_PRODUCTS.get(mode, ()) if train else ("forward",):
            shape = (columns, rows) if kind == "dgrad" else (rows, columns)
            choice = choices.find(choices.Key(choices.Product(kind), *shape, tokens, DTYPE))
            if choice and choice.sparse and choice.dense_ms is not None and choice.sparse_ms is not None:
                gain += choice.dense_ms - choice.sparse_ms
    return gain, flops


def moved_bytes(model: Model, tokens: int, train: bool) -> float:
    """Operands, inputs and outputs of the linears once a product; packed gradients once."""
    total = 0.0
    for rows, columns in model.linears().values():
        product = rows * columns * 9 / 8 + 2 * tokens * (rows + columns)
        total += product if not train else 2 * product + 2 * tokens * (rows + columns) + rows * columns
    return total


def timed(model: Model, arguments, accumulate: str) -> dict:
    """{pass: {mode: samples}}, ms a block; "dense" is among the modes."""
    from slope_megatron.bench.block import Stack
    from slope_megatron.bench.linears import MODES, LinearMaker, WithAdapters

    linears: dict[str, LinearMaker] = {mode: MODES[mode] for mode in ("dense", *arguments.modes)}
    for share in arguments.adapters:
        linears[mode_of(share)] = functools.partial(WithAdapters, rank=rank_of(model, share))
    stacks = {
        mode: Stack(model, linear, arguments.blocks, arguments.tokens, accumulate) for mode, linear in linears.items()
    }
    return {name: timed_stacks(stacks, name, arguments) for name in ("train", "forward")}


def timed_stacks(stacks: dict, name: str, arguments) -> dict[str, list[float]]:
    """Samples (ms a block) of each stack's method `name`; "dense" is among the stacks."""
    from slope_megatron.bench.block import captured
    from slope_megatron.ops.autotune import timing

    functions = {}
    for label, stack in stacks.items():
        function = getattr(stack, name)
        function()
        functions[label] = function if arguments.eager else captured(function).replay
    rough = timing.median(timing.interleaved(functions, rounds=3, calls=1)["dense"])
    calls = timing.calls_for(rough, target=60.0)
    samples = timing.interleaved(functions, rounds=arguments.rounds, calls=calls)
    return {label: [ms / arguments.blocks for ms in values] for label, values in samples.items()}


def row(model: Model, mode: str, accumulate: str, name: str, samples: dict, arguments, bandwidth, peak) -> dict:
    from slope_megatron.bench.linears import E4M3_MODES
    from slope_megatron.ops.autotune import timing

    dense_ms, sparse_ms = timing.median(samples["dense"]), timing.median(samples[mode])
    gain, flops = gemm_gain(model, mode, arguments.tokens, name == "train")
    # With e4m3 and adapters all else is not the same, so there is no ceiling of this kind.
    shares = {mode_of(share): share for share in arguments.adapters}
    ceiling = None if mode in (*E4M3_MODES, *shares) else dense_ms / (dense_ms - gain)
    adapters = dict.fromkeys(("rank", "kept", "flop_bound", "byte_bound"), "") if shares else {}
    if mode in shares:
        adapters = kept_speed(model, shares[mode], name, samples, arguments.tokens, bandwidth)
    if peak and mode in E4M3_MODES:
        peak *= 2
    pairs = [dense / sparse for dense, sparse in zip(samples["dense"], samples[mode], strict=True)]
    return rounded(
        {
            "model": model.name,
            "mode": mode,
            "pass": name,
            "tokens": arguments.tokens,
            "dense_ms": dense_ms,
            "sparse_ms": sparse_ms,
            "ratio": dense_ms / sparse_ms,
            "spread": timing.spread(pairs),
            "accumulate": accumulate if name == "train" else "",
            "ceiling": "" if ceiling is None else ceiling,
            "reached": (dense_ms / sparse_ms - 1) / (ceiling - 1) if ceiling and ceiling > 1 else "",
            "floor_ms": moved_bytes(model, arguments.tokens, name == "train") / bandwidth * 1e3,
            "peak_share": flops / sparse_ms / 1e9 / peak if peak else "",
            "launch": "eager" if arguments.eager else "graph",
            **adapters,
        }
    )


def check_modes(modes: list[str], adapters: list[float]) -> None:
    """
    Raises:
        ValueError: an unknown mode, or adapters without what they are compared with.
    """
    from slope_megatron.bench.linears import MODES

    unknown = [mode for mode in modes if mode not in MODES or mode == "dense"]
    if unknown:
        known = ", ".join(mode for mode in MODES if mode != "dense")
        raise ValueError(f"--modes holds {unknown[0]!r}: the modes timed against dense are {known}")
    if adapters and "paper" not in modes:
        raise ValueError(f"--adapters with --modes {' '.join(modes)}: they are compared with paper; add it to --modes")


def chart(rows: list[dict], folder) -> None:
    """A group of bars for each model and pass, a bar for each mode."""
    ratios: dict[str, dict[str, float]] = {}
    for item in sorted(rows, key=lambda item: item["pass"] != "train"):  # training of all models, then forward
        label = " ".join(filter(None, (item["model"], item["pass"], item["accumulate"])))
        ratios.setdefault(item["mode"], {})[label] = item["ratio"]
    labels = list(dict.fromkeys(label for bars in ratios.values() for label in bars))
    series = {mode: [bars.get(label, float("nan")) for label in labels] for mode, bars in ratios.items()}
    bar_chart("block", labels, series, machine(), folder)


def main(arguments) -> int:
    clock = begin(arguments)
    check_modes(arguments.modes, arguments.adapters)
    import torch

    bandwidth, peak = copy_bandwidth(), sparse_peak()
    rows = []
    for name in clock.within(arguments.models):
        for accumulate in arguments.accumulate:
            results = timed(MODELS[name], arguments, accumulate)
            for kind, samples in results.items():
                for mode in (*arguments.modes, *map(mode_of, arguments.adapters)):
                    rows.append(row(MODELS[name], mode, accumulate, kind, samples, arguments, bandwidth, peak))
                    clock.say(" ".join(str(value) for value in rows[-1].values()))
            path = write_csv("block", rows, arguments.out)
            del results
            gc.collect()
            torch.cuda.empty_cache()
    columns = ["model", "mode", "pass", "accumulate", "dense_ms", "sparse_ms", "ratio", "spread", "ceiling", "reached"]
    print_table(rows, [*columns, *(["kept"] if arguments.adapters else [])])
    chart(rows, arguments.out)
    print(f"wrote {path}")
    return 0
