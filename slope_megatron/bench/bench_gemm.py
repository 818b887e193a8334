"""Every linear of the models at every tensor-parallel size: the 2:4 products against the dense ones.

Dense, cuSPARSELt's best and the best of our own kernels (where they compile) alternate in one run; `ratio` is the
faster one's. Times are medians; the spread is half the distance between the quartiles.
`floor_ms` is the time that the fewest possible bytes of the sparse product (operand, X and Y once each) take at the
machine's measured copy bandwidth; `peak_share` is of the datasheet's 2:4 rate. wgrad's 2:4 times hold all that `full`
mode does for it, from dY to the packed gradient: pruning dY (`prune_ms`, timed apart), the product, and keeping half of
it. Its dense time is the product alone, as a dense layer has it; the choice compares with the kept half of that.

`--dtype e4m3` times dense bf16, and dense and 2:4 e4m3 (gemm_e4m3.csv). `rounding_ms` is what a product's inputs cost
on the way to e4m3 (largest magnitude, then rounding; for wgrad both matrices, transposed): it is in neither product's
time, and `ratio` and `over_dense_fp8` count it on the e4m3 side. The weight is rounded once a step and not counted.
"""

from collections.abc import Callable

import torch

from slope_megatron.bench.common import bar_chart, copy_bandwidth, machine, print_table, rounded, sparse_peak, write_csv
from slope_megatron.bench.models import MODELS, Model
from slope_megatron.bench.progress import add_budget, begin

KINDS = ("forward", "dgrad", "wgrad")
# Columns that are printed, of those that there are.
TABLE = (
    *("dense_ms", "cusparselt_ratio", "tiles", "cutlass_ratio", "cutlass_algorithm", "sparse_tflops"),
    *("bf16_ms", "dense_fp8_ms", "sparse_fp8_ms", "rounding_ms", "over_dense_fp8", "sparse_fp8_tflops"),
)


def keys(model: Model, tensor_parallel: int, tokens: int, dtype, kinds) -> dict:
    """{(linear, kind): key}."""
    from slope_megatron.ops.choices import Key, Product

    found = {}
    for name, (rows, columns) in model.linears(tensor_parallel).items():
        for kind in kinds:
            shape = (columns, rows) if kind == "dgrad" else (rows, columns)
            found[(name, kind)] = Key(Product(kind), *shape, tokens, dtype)
    return found


def moved_bytes(key) -> int:
    """Operand, dense input and output once each; for wgrad dY is read and its operand is written before that.

    Its output is packed, and which half it holds is read too.
    """
    from slope_megatron.ops.custom_ops import layout

    if key.product == "wgrad":
        operand = layout.operand_bytes(key.rows, key.tokens)
        packed = key.rows * key.columns * 9 // 8
        return 2 * key.tokens * (key.rows + key.columns) + packed + 2 * operand
    return layout.operand_bytes(key.rows, key.columns) + 2 * key.tokens * (key.rows + key.columns)


def prune_ms(key, device) -> float | str:
    """Writing wgrad's operand, alone."""
    from slope_megatron.ops.autotune import timing
    from slope_megatron.ops.autotune.measure_wgrad import WgradTrial

    if key.product != "wgrad":
        return ""
    trial = WgradTrial(key, device)
    return timing.median(timing.interleaved({"": trial.write_operand}, rounds=11, calls=10)[""])


def measured(key, bandwidth: float, peak: float | None) -> dict:
    """One product's row, without the names of model and linear."""
    from slope_kernels import cutlass
    from slope_megatron.ops.autotune import measure, timing

    device = torch.device("cuda", torch.cuda.current_device())
    beside = (lambda trial: {"alone": trial.dense_gradient}) if key.product == "wgrad" else None
    samples = measure.contest(key, device, rounds=11, beside=beside)
    dense = samples.pop("alone", samples["dense"])
    choice = measure.pick(key, samples)
    dense_ms = timing.median(dense)
    times = {name: timing.median(values) for name, values in samples.items() if name != "dense"}
    ours = {name: time for name, time in times.items() if isinstance(name[1], cutlass.Algorithm)}
    library = {name: time for name, time in times.items() if name not in ours}
    best, best_library = (min(group, key=group.__getitem__) for group in (times, library))
    best_ours = min(ours, key=ours.__getitem__, default=None)
    sparse_ms = times[best]
    whole = min(time for (tiles, _), time in library.items() if tiles == 1)
    flops = 2e-9 * key.rows * key.columns * key.tokens
    return rounded(
        {
            "rows": key.rows,
            "columns": key.columns,
            "tokens": key.tokens,
            "dense_ms": dense_ms,
            "sparse_ms": sparse_ms,
            "ratio": dense_ms / sparse_ms,
            "chosen_ratio": dense_ms / sparse_ms if choice.sparse else 1.0,
            "dense_spread": timing.spread(dense),
            "sparse_spread": timing.spread(samples[best]),
            "cusparselt_ratio": dense_ms / library[best_library],
            "tiles": best_library[0],
            "untiled_ratio": dense_ms / whole,
            "algorithm": best_library[1].config,
            "cutlass_ratio": dense_ms / ours[best_ours] if ours else "",
            "cutlass_algorithm": str(best_ours[1]) if best_ours else "",
            "dense_tflops": flops / dense_ms,
            "sparse_tflops": flops / sparse_ms,
            "peak_share": flops / sparse_ms / peak if peak else "",
            "floor_ms": moved_bytes(key) / bandwidth * 1e3,
            "prune_ms": prune_ms(key, device),
        }
    )


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="models to time")
    parser.add_argument("--tensor-parallel", nargs="+", type=int, help="tensor-parallel sizes; default: each model's")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="products to time")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens T of the products")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "e4m3"), help="of the operands")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV and the chart; default: the current one")


def measuring(arguments, clock) -> tuple[str, torch.dtype, Callable]:
    """The CSV's name, the products' type, and what makes a product's row.

    Raises:
        ValueError: this machine has no e4m3 products.
    """
    if arguments.dtype == "e4m3":
        from slope_megatron.bench import gemm_float8
        from slope_megatron.ops.operands import float8
        from slope_megatron.sparsity.float8 import E4M3

        if reason := float8.unsupported():
            raise ValueError(f"--dtype e4m3 measures e4m3 products, and this machine cannot: {reason}")
        return "gemm_e4m3", E4M3, gemm_float8.measured
    bandwidth, peak = copy_bandwidth(), sparse_peak()
    clock.say(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    return "gemm", getattr(torch, arguments.dtype), lambda key: measured(key, bandwidth, peak)


def main(arguments) -> int:
    clock = begin(arguments)
    csv, dtype, measure = measuring(arguments, clock)
    ratio = "ratio" if csv == "gemm_e4m3" else "chosen_ratio"
    done: dict = {}
    rows = []
    for name in clock.within(arguments.models):
        model = MODELS[name]
        for size in arguments.tensor_parallel or model.tensor_parallel:
            for (linear, kind), key in keys(model, size, arguments.tokens, dtype, arguments.kinds).items():
                if key not in done:
                    done[key] = measure(key)
                    clock.say(f"{key}: {done[key][ratio]} times dense")
                rows.append({"model": name, "tp": size, "linear": linear, "kind": kind, **done[key]})
                path = write_csv(csv, rows, arguments.out)
        worst = min(row[ratio] for row in rows if row["model"] == name)
        clock.say(f"{name}: worst ratio {worst}")
    columns = [name for name in TABLE if name in rows[0]]
    print_table(rows, ["model", "tp", "linear", "kind", *columns])
    chart(csv, [row for row in rows if row["tp"] == 1], arguments.out)
    print(f"wrote {path}")
    return 0


def chart(csv: str, whole: list[dict], folder) -> None:
    """Times dense of the products that are not cut."""
    labels = [f"{row['model']} {row['linear']} {row['kind']}" for row in whole]
    if csv == "gemm_e4m3":
        series = {"e4m3 over dense bf16": [row["ratio"] for row in whole]}
    else:
        series = {"cuSPARSELt": [row["cusparselt_ratio"] for row in whole]}
        if any(row["cutlass_ratio"] for row in whole):
            series["our kernels"] = [row["cutlass_ratio"] or 0.0 for row in whole]
    bar_chart(csv, labels, series, machine(), folder)
