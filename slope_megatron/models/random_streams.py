"""Tie a built model's layers to the random numbers of their gradient pruning, by canonical name and row."""

import torch

from slope_megatron.layers.random_streams import RngState, RowStreams
from slope_megatron.models.canonical import shards
from slope_megatron.models.layer_spec import pruned_modules


def attach_random_streams(model: torch.nn.Module, seed: int) -> RngState:
    """One `RngState` for all pruned linears of the model; returns it, for the loop to move."""
    state = RngState(seed)
    parts: dict[str, list[tuple[str, range]]] = {}
    for shard in shards(model):
        if shard.local_name.endswith(".weight"):
            first = shard.offset[0]
            parts.setdefault(shard.local_name, []).append((shard.name, range(first, first + shard.data.shape[0])))
    pruned = {id(module) for module in pruned_modules(model)}
    for name, module in model.named_modules():
        if id(module) in pruned:
            names, rows = zip(*parts[f"{name}.weight"], strict=True)
            module.row_streams = RowStreams(state, names, rows)
    return state
