"""Rules by name, without Megatron: which linears of a block are sparse (also as a table), and how a tensor starts.

They serve our own models and, through the plugins, those of the upstream's scripts.
"""

import itertools
import math
import re

from slope_megatron.config import Config, SlopeConfig

# A block's linears, in the order in which a forward pass meets them.
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

# How a tensor starts, by its name in the model (in checkpoints, norms go by Transformer Engine's fused names).
ZERO = re.compile(r"\.bias$|\.adapter_r$")
ONE = re.compile(r"norm\.weight$")
STANDARD_NORMAL = re.compile(r"\.adapter_l$")
ADAPTER = re.compile(r"\.adapter_[lr]$")
EMBEDDING = re.compile(r"(^|\.)(word|position|tokentype)_embeddings\.weight$")
OUTPUT_PROJECTION = re.compile(r"\.(linear_proj|linear_fc2)\.weight$")


def sparse_linears(slope: SlopeConfig, block: int) -> set[str]:
    """Which linears of a block (counted from 0 over all pipeline stages) are sparse.

    Source: SLoPe, section 3: all attention and MLP linears but the first one after the input. FST: the MLP's alone.
    """
    if not slope.for_block(block).enabled:
        return set()
    names = set()
    if slope.prunes_attention:
        names |= {"linear_qkv", "linear_proj"}
    if slope.sparse_mlp:
        names |= {"linear_fc1", "linear_fc2"}
    if block == 0 and slope.dense_first_linear:
        names.discard("linear_qkv")
    return names


def packed_linears(slope: SlopeConfig, block: int) -> frozenset[str]:
    """Those of them that are stored packed; a baseline's are masked."""
    return frozenset(sparse_linears(slope, block) if slope.for_block(block).packed else ())


def sparsity_table(config: Config) -> str:
    """N:M or `dense` of each linear, a line for each run of blocks that are alike; embeddings and heads are dense."""

    def row(block: int) -> tuple[str, ...]:
        sparse, nm = sparse_linears(config.slope, block), config.slope.for_block(block).nm
        return tuple(nm if name in sparse else "dense" for name in LINEARS)

    lines = [f"{'blocks':12}" + "".join(f"{name.removeprefix('linear_'):>7}" for name in LINEARS)]
    for entries, alike in itertools.groupby(range(config.model.num_layers), key=row):
        members = list(alike)
        span = str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"
        lines.append(f"{span:12}" + "".join(f"{entry:>7}" for entry in entries))
    lines.append("embeddings, output layer: dense")
    return "\n".join(lines)


def initial_std(name: str, init_std: float, num_layers: int) -> float:
    """Standard deviation of a random weight: Megatron's, smaller for what writes into the residual stream."""
    if STANDARD_NORMAL.search(name):
        return 1.0
    return init_std / math.sqrt(2.0 * num_layers) if OUTPUT_PROJECTION.search(name) else init_std
