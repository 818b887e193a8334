"""Which linears are sparse, and how: the table that a run prints when it starts."""

import itertools

from slope_megatron.config import Config
from slope_megatron.models.rules import sparse_linears
from slope_megatron.models.shapes import block_linears


def row_of(config: Config, block: int) -> tuple[str, ...]:
    """N:M or `dense` for each linear of one block."""
    sparse = sparse_linears(config.slope, block)
    nm = config.slope.for_block(block).nm
    return tuple(nm if name in sparse else "dense" for name in block_linears(config.model))


def sparsity_table(config: Config) -> str:
    """One line for each run of blocks that are alike; embeddings and heads are always dense."""
    lines = [f"{'blocks':12}" + "".join(f"{name.removeprefix('linear_'):>7}" for name in block_linears(config.model))]
    blocks = range(config.model.num_layers)
    for row, alike in itertools.groupby(blocks, key=lambda block: row_of(config, block)):
        members = list(alike)
        span = str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"
        lines.append(f"{span:12}" + "".join(f"{entry:>7}" for entry in row))
    lines.append("embeddings, output layer: dense")
    return "\n".join(lines)
