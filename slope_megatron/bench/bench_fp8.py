"""Every linear of the models in e4m3: forward and dgrad dense in bf16, dense and 2:4 in e4m3; wgrad dense in both.

All alternate in one run. `rounding_ms` is what a product's inputs cost on the way to e4m3 (largest magnitude, then
rounding; for wgrad both matrices, transposed): it is in neither product's time, and `ratio` and `over_dense_fp8` count
it on the e4m3 side. The weight is rounded once a step and not counted.
"""

from slope_megatron.bench.common import bar_chart, machine, print_table, rounded, write_csv
from slope_megatron.bench.models import MODELS
from slope_megatron.bench.progress import add_budget, begin


def forward_like(key) -> dict:
    """Times (ms) of one forward or dgrad product."""
    import torch

    from slope_megatron.ops.autotune import measure_cusparselt, timing
    from slope_megatron.ops.autotune.measure_float8 import Float8Trial
    from slope_megatron.ops.custom_ops import float8 as float8_products

    device = torch.device("cuda", torch.cuda.current_device())
    trial = Float8Trial(key, device)
    x, w, y = trial.q_TS.to(torch.bfloat16), trial.w_RS.to(torch.bfloat16), trial.y_TR
    candidates = measure_cusparselt.finalists(trial, [1])
    # The candidates by number.
    functions: dict = {
        "bf16": lambda: torch.mm(x, w.t(), out=y),
        "dense_fp8": trial.dense_product,
        "rounding": lambda: float8_products.quantize(x, True, False),
    }
    functions |= {candidate.algorithm.config: candidate for candidate in candidates if candidate.algorithm}
    return timing.interleaved(functions, rounds=7, calls=5)


def weight_gradient(rows: int, columns: int, tokens: int) -> dict:
    """Times (ms) of one wgrad product."""
    import torch

    from slope_megatron.ops.autotune import timing
    from slope_megatron.ops.custom_ops import float8 as float8_products

    dy = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    rounding = lambda: [float8_products.quantize(part, False, True) for part in (dy, x)]  # noqa: E731
    (_, q_NT, dy_scale), (_, q_KT, x_scale) = rounding()
    functions = {
        "bf16": lambda: dy.t() @ x,
        "dense_fp8": lambda: float8_products.dense_mm(q_NT, q_KT, dy_scale, x_scale, None, dy.dtype),
        "rounding": rounding,
    }
    return timing.interleaved(functions, rounds=7, calls=5)


def measured(kind: str, rows: int, columns: int, tokens: int) -> dict:
    """One product's row, without the names of model and linear; `rows` x `columns` is the operand, for wgrad W."""
    from slope_megatron.ops.autotune import timing
    from slope_megatron.ops.choices import Key, Product
    from slope_megatron.sparsity.float8 import E4M3

    if kind == "wgrad":
        samples = weight_gradient(rows, columns, tokens)
    else:
        samples = forward_like(Key(Product(kind), rows, columns, tokens, E4M3))
    times = {name: timing.median(values) for name, values in samples.items()}
    sparse = [name for name in times if isinstance(name, int)]
    best = min(sparse, key=times.__getitem__, default=None)
    fastest = min(times["dense_fp8"], times.get(best, float("inf")))
    flops = 2e-9 * rows * columns * tokens
    return rounded(
        {
            "rows": rows,
            "columns": columns,
            "tokens": tokens,
            "bf16_ms": times["bf16"],
            "dense_fp8_ms": times["dense_fp8"],
            "sparse_fp8_ms": times.get(best, ""),
            "rounding_ms": times["rounding"],
            "ratio": times["bf16"] / (fastest + times["rounding"]),
            "over_dense_fp8": (times["dense_fp8"] + times["rounding"]) / (fastest + times["rounding"]),
            "spread": max(timing.spread(samples[name]) for name in ("bf16", "dense_fp8", *([best] if sparse else []))),
            "algorithm": best if sparse else "",
            "bf16_tflops": flops / times["bf16"],
            "dense_fp8_tflops": flops / times["dense_fp8"],
            "sparse_fp8_tflops": flops / times[best] if sparse else "",
        }
    )


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="models to time")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens T of the products")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV and the chart; default: the current one")


def main(arguments) -> int:
    clock = begin(arguments)
    from slope_megatron.ops.operands import float8

    if reason := float8.unsupported():
        raise ValueError(f"slope bench fp8 measures e4m3 products, and this machine cannot: {reason}")
    done: dict = {}
    rows = []
    for name in clock.within(arguments.models):
        for linear, (out, width) in MODELS[name].linears().items():
            for kind, shape in (("forward", (out, width)), ("dgrad", (width, out)), ("wgrad", (out, width))):
                product = (kind, *shape, arguments.tokens)
                if product not in done:
                    done[product] = measured(*product)
                rows.append({"model": name, "linear": linear, "kind": kind, **done[product]})
                clock.say(" ".join(str(value) for value in rows[-1].values()))
                path = write_csv("fp8", rows, arguments.out)
    columns = ["model", "linear", "kind", "bf16_ms", "dense_fp8_ms", "sparse_fp8_ms", "rounding_ms"]
    print_table(rows, [*columns, "ratio", "over_dense_fp8", "sparse_fp8_tflops"])
    labels = [f"{row['model']} {row['linear']} {row['kind']}" for row in rows]
    bar_chart("fp8", labels, {"e4m3 over dense bf16": [row["ratio"] for row in rows]}, machine(), arguments.out)
    print(f"wrote {path}")
    return 0
