"""Bandwidth of every kernel that moves weights or gradients, as a share of the machine's measured copy bandwidth.

Bytes are the fewest that the kernel must read and write, once each.
"""

from common import copy_bandwidth, machine, print_table, require_gpu, rounded, say, write_csv

TOKENS = 8192
SHAPES = ((7680, 2560), (5120, 20480), (20480, 5120), (36864, 9216))


def kernels(rows: int, columns: int, dtype) -> dict:
    """{name: (function, bytes)} on fresh random data."""
    import torch

    from slope_kernels.triton import gather, metadata, refresh
    from slope_megatron.ops import choices, layout, measure

    device, weights = torch.device("cuda"), rows * columns
    row_bits = measure.random_bits(rows, columns, device)
    values = torch.randn(rows, columns // 2, device=device).to(dtype)
    dense = torch.randn(rows, columns, device=device).to(dtype)
    column_bits = torch.empty(rows, columns // 16, dtype=torch.uint8, device=device)
    meta = torch.empty(weights // 8, dtype=torch.uint8, device=device)
    metadata.choose_column(values, row_bits, column_bits, meta)
    forward = torch.empty(layout.operand_bytes(rows, columns), dtype=torch.uint8, device=device)
    backward = torch.empty_like(forward)
    total = torch.zeros(rows, columns // 2, device=device)
    total16 = torch.zeros_like(values)
    packed, row, column = weights, weights // 8, weights // 16
    trial = measure.prepare(choices.Key("wgrad", rows, columns, TOKENS, dtype), device)
    return {
        # dY is read, the values and the metadata of its operand are written: 2 + 1 + 1/8 bytes.
        "mvue_operand": (trial.write_operand, TOKENS * rows * 25 // 8),
        "refresh": (
            lambda: refresh.refresh(values, row_bits, column_bits, forward, backward),
            3 * packed + row + column,
        ),
        "choose_column": (
            lambda: metadata.choose_column(values, row_bits, column_bits, meta),
            packed + row + column + weights // 8,
        ),
        "column_metadata": (
            lambda: metadata.column_metadata(row_bits, column_bits, meta),
            row + column + weights // 8,
        ),
        "row_metadata": (lambda: metadata.row_metadata(row_bits, meta), row + weights // 8),
        "gather": (lambda: gather.gather(dense, row_bits, values), 2 * weights + row + packed),
        "gather_add_fp32": (lambda: gather.gather_add(dense, row_bits, total), 2 * weights + row + 4 * packed),
        "gather_add_16": (lambda: gather.gather_add(dense, row_bits, total16), 2 * weights + row + 2 * packed),
        "unpack": (lambda: gather.unpack(values, row_bits, dense), 2 * weights + row + packed),
    }


def add_arguments(parser) -> None:
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--out", help="folder for the CSV; default: kernels/benchmarks/results")


def main(arguments) -> int:
    require_gpu()
    import torch

    from slope_megatron.ops import timing

    bandwidth = copy_bandwidth()
    say(f"{machine()}\ncopy bandwidth {bandwidth / 1e12:.2f} TB/s")
    results = []
    for rows, columns in SHAPES:
        cases = kernels(rows, columns, getattr(torch, arguments.dtype))
        samples = timing.interleaved({name: function for name, (function, _) in cases.items()}, rounds=11, calls=5)
        for name, (_, moved) in cases.items():
            ms = timing.median(samples[name])
            results.append(
                rounded(
                    {
                        "kernel": name,
                        "rows": rows,
                        "columns": columns,
                        "ms": ms,
                        "spread": timing.spread(samples[name]),
                        "tbytes_per_s": moved / ms / 1e9,
                        "floor_ms": moved / bandwidth * 1e3,
                        "share_of_copy": moved / ms * 1e3 / bandwidth,
                    }
                )
            )
        del cases
    path = write_csv("refresh", results, arguments.out)
    print_table(results, ["kernel", "rows", "columns", "ms", "spread", "tbytes_per_s", "share_of_copy"])
    print(f"wrote {path}")
    return 0
