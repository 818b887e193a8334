"""Time of one step, from measured products or from a stated MFU. An estimate: its assumptions are its arguments.

T tokens of a micro-batch, M micro-batches of a replica, P pipeline stages.

    micro-batch   products + pointwise traffic + tensor-parallel reductions, of the slowest stage
    product       2:4 where a packed weight is read: forward and dgrad; in mode "full" wgrad too, of a dY that is pruned
                  first. A baseline's are dense, and its masks' own work is not counted.
    step          (M + P - 1) x micro-batch + what replicas send each other (`traffic`)
    bubble        (P - 1) / (M + P - 1)
"""

import csv
import dataclasses
import math
from collections import Counter
from pathlib import Path

from slope_megatron.config import Config, shipped
from slope_megatron.config.text_file import lines_of, read_text
from slope_megatron.launch.cluster import Cluster
from slope_megatron.models.counts import stage_counts
from slope_megatron.models.rules import packed_linears
from slope_megatron.models.shapes import block_linears, padded_rows
from slope_megatron.planner.layout import Layout
from slope_megatron.planner.memory import Precision, block_activation_bytes
from slope_megatron.planner.traffic import data_parallel_bytes

# Of one message between GPUs, whatever its size. Assumed.
LATENCY = 20e-6
PRODUCTS = ("forward", "dgrad", "wgrad")
# Compute capabilities whose 2:4 metadata layout our kernels write; elsewhere a wgrad's operand is not pruned.
KNOWN_METADATA = (90,)
COLUMNS = ("kind", "rows", "columns", "tokens", "dense_ms", "sparse_ms")


@dataclasses.dataclass(frozen=True)
class Rate:
    """One measured product; `tflops` counts the dense product's operations, so that kinds compare."""

    kind: str
    product: str
    tokens: int
    out: int
    width: int
    tflops: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast products run.

    Args:
        measured: of a CSV; empty: `mfu` of the GPU's peak for a dense product, which then stands for the whole block.
        mfu: model FLOPs utilisation that a dense step is said to reach.
        sparse_speedup: of a 2:4 product over its dense twin, where nothing is measured.
        source: the CSV.
    """

    measured: tuple[Rate, ...]
    mfu: float
    sparse_speedup: float
    source: str = ""

    def measures(self, kind: str, product: str) -> bool:
        return any((rate.kind, rate.product) == (kind, product) for rate in self.measured)

    def seconds(self, kind: str, product: str, tokens: int, out: int, width: int, peak: float) -> float:
        """One product of this shape, at the rate of the nearest measured one."""
        operations = 2.0 * tokens * out * width
        # Where no wgrad was measured, any product of its kind and size stands for it.
        alike = product if self.measures(kind, product) or product != "wgrad" else None
        near = [rate for rate in self.measured if rate.kind == kind and alike in (rate.product, None)]
        if near:

            def distance(rate: Rate) -> float:
                pairs = ((tokens, rate.tokens), (out, rate.out), (width, rate.width))
                return sum(abs(math.log(ours / theirs)) for ours, theirs in pairs)

            return operations / (min(near, key=distance).tflops * 1e12)
        faster = self.sparse_speedup if kind == "sparse" else 1.0
        return operations / (self.mfu * peak * 1e12 * faster)


def own_rates(capability: int) -> Path | None:
    """This repository's measurement on a GPU of that compute capability, where there is one."""
    path = shipped.folder("results") / "gemm.csv"
    if not path.is_file():
        return None
    return path if f"architecture=sm_{capability} " in path.read_text().partition("\n")[0] else None


def read_rates(path: Path) -> tuple[Rate, ...]:
    """Rates that `slope bench gemm` measured: its CSV.

    Where the dense product was the faster one it counts for 2:4 as well: the backend takes it there.

    Raises:
        ValueError: no such file, or a line that is no measurement.
    """
    if not path.is_file():
        raise ValueError(f"--rates {path} does not exist: give the CSV of `slope bench gemm`, or --mfu")
    lines = [line for line in lines_of(read_text(path)) if not line.startswith("#")]
    table = csv.DictReader(lines)
    lacking = set(COLUMNS) - set(table.fieldnames or ())
    if lacking:
        raise ValueError(
            f"--rates {path} lacks the columns {', '.join(sorted(lacking))}: give the CSV of `slope bench gemm`"
        )
    found = []
    for line in table:
        try:
            rows, columns, tokens = (int(line[name]) for name in ("rows", "columns", "tokens"))
            dense_ms, sparse_ms = float(line["dense_ms"]), float(line["sparse_ms"])
            operations = 2e-9 * rows * columns * tokens
            # A dgrad's matrix is the weight transposed.
            out, width = (columns, rows) if line["kind"] == "dgrad" else (rows, columns)
            found.append(Rate("dense", line["kind"], tokens, out, width, operations / dense_ms))
            found.append(Rate("sparse", line["kind"], tokens, out, width, operations / min(dense_ms, sparse_ms)))
        except (ValueError, ZeroDivisionError, TypeError):
            raise ValueError(f"--rates {path}: {line} is no measurement: give the CSV of `slope bench gemm`") from None
    if not found:
        raise ValueError(f"--rates {path} holds no measurement: give the CSV of `slope bench gemm`, or --mfu")
    return tuple(found)


def bubble(layout: Layout, micro_batches: int) -> float:
    """Share of a step that a pipeline stage waits (1F1B)."""
    return (layout.pipeline - 1) / (micro_batches + layout.pipeline - 1)


def prunes_wgrad(full: bool, cluster: Cluster) -> bool:
    """Whether a wgrad is a 2:4 product on these GPUs; `full`: mode "full"."""
    return full and cluster.gpu_arch in KNOWN_METADATA


def linear_seconds(
    rates: Rates, cluster: Cluster, packed: bool, full: bool, passes: tuple[str, ...], tokens: int, shape, b: int
) -> float:
    """The products of one linear; `shape` (out, in) on this rank, `full`: mode "full".

    A pruned wgrad's measured time holds the pruning of dY. Where only other products were measured, it is one of 2:4
    dY^T `[out, T]` with X `[T, in]`, and before it dY is read, its kept half and metadata written; a dense one where
    the metadata's layout is not known.
    """
    out, width = shape
    peak = cluster.peak_tflops
    kind = "sparse" if packed and cluster.sparse_24 else "dense"
    seconds = sum(rates.seconds(kind, product, tokens, out, width, peak) for product in passes if product != "wgrad")
    wgrad = rates.seconds("dense", "wgrad", tokens, out, width, peak)
    if full and rates.measures(kind, "wgrad"):
        wgrad = rates.seconds(kind, "wgrad", tokens, out, width, peak)
    elif kind == "sparse" and prunes_wgrad(full, cluster):
        pruning = tokens * out * (b + b / 2 + 1 / 8) / (cluster.memory_gbs * 1e9)
        wgrad = min(wgrad, rates.seconds("sparse", "wgrad", width, out, tokens, peak) + pruning)
    return seconds + wgrad


def block_seconds(config: Config, layout: Layout, cluster: Cluster, rates: Rates, packed: frozenset, b: int) -> float:
    """Forward and backward of one micro-batch through one block on one GPU; `packed` names its packed linears."""
    tokens = config.data.seq_length * config.data.micro_batch_size
    peak, full = cluster.peak_tflops, config.slope.mode == "full"
    passes = ("forward", *PRODUCTS) if layout.recompute == "full" else PRODUCTS
    seconds = 0.0
    for name, linear in block_linears(config.model).items():
        local = linear.shard(layout.tensor)
        seconds += linear_seconds(rates, cluster, name in packed, full, passes, tokens, local, b)
    # Causal attention: two products of T x s over half the pairs; backward twice that.
    attention = 2.0 * tokens * config.data.seq_length * config.model.hidden_size / layout.tensor
    # `passes` counts right here too: forward once (or twice), backward as two.
    seconds += attention * len(passes) / (rates.mfu * peak * 1e12)
    if rates.measured:
        # Products alone leave out norms, activations and residuals: what is kept is written, read, and read again.
        seconds += 3 * block_activation_bytes(config, layout, b) / (cluster.memory_gbs * 1e9)
    # Two reductions of T x h a pass, at ring cost.
    reductions = 2 * (3 if layout.recompute == "full" else 2)
    moved = tokens * config.model.hidden_size * b * 2 * (layout.tensor - 1) / layout.tensor
    messages = LATENCY if layout.tensor > 1 else 0.0
    return seconds + reductions * (moved / (cluster.intra_gbs * 1e9) + messages)


def step_seconds(
    config: Config, layout: Layout, cluster: Cluster, rates: Rates, vocabulary: int, bytes_of: Precision
) -> float:
    """One optimizer step of the whole machine."""
    micro_batches = config.data.micro_batches(layout.data)
    tokens = config.data.seq_length * config.data.micro_batch_size
    # The last stage has the output layer besides: the slowest.
    share = padded_rows(config.model, vocabulary) // layout.tensor
    head = sum(
        rates.seconds("dense", product, tokens, share, config.model.hidden_size, cluster.peak_tflops)
        for product in PRODUCTS
    )
    kinds = Counter(packed_linears(config.slope, block) for block in range(config.model.num_layers))
    whole = sum(
        many * block_seconds(config, layout, cluster, rates, packed, bytes_of.weight) for packed, many in kinds.items()
    )
    micro = whole / layout.pipeline + head
    per_gpu = cluster.network_gbs * 1e9 / cluster.gpus_per_node
    if layout.pipeline > 1:
        moved = tokens * config.model.hidden_size * bytes_of.weight / layout.tensor
        micro += 2 * (moved / per_gpu + LATENCY)
    counts = stage_counts(config, vocabulary, layout.pipeline, 0, layout.tensor)
    spread = layout.gpus > cluster.gpus_per_node
    link = per_gpu if spread else cluster.intra_gbs * 1e9
    sent = data_parallel_bytes(
        counts.trained, layout.data, layout.zero, micro_batches, bytes_of.dtype, config.parallel.grad_reduce_dtype
    )
    return (micro_batches + layout.pipeline - 1) * micro + sum(sent.values()) / link
