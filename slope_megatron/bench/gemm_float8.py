"""`slope bench gemm --dtype e4m3`: products dense in bf16, dense and 2:4 in e4m3; wgrad dense in both.

All alternate in one run. `rounding_ms` is what a product's inputs cost on the way to e4m3 (largest magnitude, then
rounding; for wgrad both matrices, transposed): it is in neither product's time, and `ratio` and `over_dense_fp8` count
it on the e4m3 side. The weight is rounded once a step and not counted.
"""

from slope_megatron.bench.common import rounded


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


def measured(key) -> dict:
    """One product's row, without the names of model and linear; `rows` x `columns` is the operand, for wgrad W."""
    from slope_megatron.ops.autotune import timing

    rows, columns, tokens = key.rows, key.columns, key.tokens
    samples = weight_gradient(rows, columns, tokens) if key.product == "wgrad" else forward_like(key)
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
