"""Tie a built model's layers to the random numbers of their gradient pruning, by canonical name and row."""

import torch

from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.layers.random_streams import RngState, RowStreams
from slope_megatron.models.canonical import shards


def attach_random_streams(model: torch.nn.Module, seed: int) -> RngState:
    """One `RngState` for all pruned linears of the model; returns it, for the loop to move."""
    state = RngState(seed)
    parts: dict[PrunedLinear, list[tuple[str, range]]] = {}
    for shard in shards(model):
        if isinstance(shard.owner, PrunedLinear) and shard.leaf == "weight":
            first = shard.offset[0]
            parts.setdefault(shard.owner, []).append((shard.name, range(first, first + shard.data.shape[0])))
    for module, named_rows in parts.items():
        names, rows = zip(*named_rows, strict=True)
        module.row_streams = RowStreams(state, names, rows)
    return state
