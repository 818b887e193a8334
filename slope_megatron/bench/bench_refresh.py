"""Bandwidth of every kernel that moves weights or gradients, as a share of the machine's measured copy bandwidth.

Bytes are the fewest that the kernel must read and write, once each. A kernel is captured in a CUDA graph over as many
copies of its tensors as overflow the cache, so that neither launches nor the cache are timed.
"""

import dataclasses
from collections.abc import Callable

from slope_megatron.bench.common import copy_bandwidth, print_table, rounded, write_csv
from slope_megatron.bench.progress import add_budget, begin

TOKENS = 8192
# Quads, warps and registers.
MVUE_SETTINGS = ((8, 4, 64), (8, 4, 56), (8, 4, 80), (8, 4, 128), (4, 2, 64), (4, 2, 80), (4, 4, 64), (8, 2, 128))
SHAPES = ((7680, 2560), (5120, 20480), (20480, 5120), (36864, 9216))


@dataclasses.dataclass
class Case:
    """One kernel on one weight: `run(*tensors)` moves `moved` bytes."""

    name: str
    run: Callable
    tensors: tuple
    moved: int


def cases(rows: int, columns: int, dtype) -> list[Case]:
    """Every kernel on fresh random data."""
    import torch

    from slope_kernels.triton import choose, gather, metadata, mvue, refresh
    from slope_megatron.ops.autotune.measure_wgrad import WgradTrial
    from slope_megatron.ops.autotune.trials import random_bits
    from slope_megatron.ops.choices import Key, Product
    from slope_megatron.ops.custom_ops import layout

    device, weights = torch.device("cuda"), rows * columns
    row_bits = random_bits(rows, columns, device)
    values = torch.randn(rows, columns // 2, device=device).to(dtype)
    dense = torch.randn(rows, columns, device=device).to(dtype)
    column_bits = torch.empty(rows, columns // 16, dtype=torch.uint8, device=device)
    choose.choose_column(values, row_bits, column_bits)
    meta = torch.empty(weights // 8, dtype=torch.uint8, device=device)
    forward = torch.empty(layout.operand_bytes(rows, columns), dtype=torch.uint8, device=device)
    backward = torch.empty_like(forward)
    packed, row, column = weights, weights // 8, weights // 16
    # Metadata of columns follows from three rows of four.
    three_of_four = (row + column) * 3 // 4
    patterns = (row_bits, column_bits)
    trial = WgradTrial(Key(Product.WGRAD, rows, columns, TOKENS, dtype), device)
    gradient = (trial.dy_TN, trial.rng_key, trial.streams, trial.operand)
    return [
        Case("refresh", refresh.refresh, (values, *patterns, forward, backward), 3 * packed + row + column),
        Case("choose_column", choose.choose_column, (values, *patterns), packed + row + column),
        Case("column_metadata", metadata.column_metadata, (*patterns, meta), three_of_four + weights // 8),
        Case("row_metadata", metadata.row_metadata, (row_bits, meta), row + weights // 8),
        Case("gather", gather.gather, (dense, row_bits, values), 2 * weights + row + packed),
        Case("unpack", gather.unpack, (values, row_bits, dense), 2 * weights + row + packed),
        # dY of TOKENS tokens is read, the values and the metadata of its operand are written: 2 + 1 + 1/8 bytes.
        Case("mvue_operand", mvue.mvue_operand, gradient, TOKENS * rows * 25 // 8),
    ]


def variants(case: Case) -> dict[str, dict]:
    """Settings to try of a kernel: {what to call it: keyword arguments}."""
    if case.name == "refresh":
        tried = [((4, 16), 1), ((4, 16), 4), ((4, 16), 16), ((4, 8), 4), ((4, 32), 4), ((8, 16), 4), ((2, 32), 4)]
        return {f"{lanes} {band}": {"lanes": lanes, "band": band} for lanes, band in tried}
    if case.name == "row_metadata":
        return {str(sets): {"sets": sets} for sets in (4, 8, 16, 32)}
    if case.name in ("choose_column", "column_metadata"):
        return {str(threads): {"threads": threads} for threads in (32, 64, 128)}
    if case.name == "mvue_operand":
        names = ("quads", "warps", "registers")
        return {" ".join(map(str, tried)): dict(zip(names, tried, strict=True)) for tried in MVUE_SETTINGS}
    return {"": {}}


def graph(case: Case, **settings):
    """A CUDA graph of the kernel on several copies of its tensors; and how many."""
    import torch

    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = min(64, 1 + 3 * cache // case.moved)
    copies = [case.tensors] + [tuple(tensor.clone() for tensor in case.tensors) for _ in range(count - 1)]
    case.run(*case.tensors, **settings)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for tensors in copies:
            case.run(*tensors, **settings)
    # The graph reads the copies' memory, so they must live as long.
    return lambda copies=copies: captured.replay(), count


def timed(found: list[Case], bandwidth: float, rows: int, columns: int, *, sweep: bool) -> list[dict]:
    """A row for each kernel, or for each setting of it."""
    from slope_megatron.ops.autotune import timing

    results = []
    for case in found:
        settings = variants(case) if sweep else {"": {}}
        graphs = {name: graph(case, **more) for name, more in settings.items()}
        samples = timing.interleaved({name: replay for name, (replay, _) in graphs.items()}, rounds=11, calls=2)
        for name, (_, count) in graphs.items():
            ms = timing.median(samples[name]) / count
            row = {"kernel": case.name, "rows": rows, "columns": columns, "ms": ms}
            row |= {"setting": name} if sweep else {}
            row |= {"spread": timing.spread(samples[name]), "tbytes_per_s": case.moved / ms / 1e9}
            row |= {"floor_ms": case.moved / bandwidth * 1e3, "share_of_copy": case.moved / ms * 1e3 / bandwidth}
            results.append(rounded(row))
    return results


def add_arguments(parser) -> None:
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--sweep", action="store_true", help="time several settings of each kernel; writes no CSV")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV; default: the current one")


def main(arguments) -> int:
    clock = begin(arguments)
    import torch

    bandwidth = copy_bandwidth()
    clock.say(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    results, path = [], None
    for rows, columns in clock.within(list(SHAPES[1::2] if arguments.sweep else SHAPES)):
        found = cases(rows, columns, getattr(torch, arguments.dtype))
        if arguments.sweep:
            found = [case for case in found if len(variants(case)) > 1]
        results += timed(found, bandwidth, rows, columns, sweep=arguments.sweep)
        if not arguments.sweep:
            path = write_csv("refresh", results, arguments.out)
    names = ["kernel", "rows", "columns", *(["setting"] if arguments.sweep else [])]
    print_table(results, [*names, "ms", "spread", "tbytes_per_s", "share_of_copy"])
    if path:
        print(f"wrote {path}")
    return 0
