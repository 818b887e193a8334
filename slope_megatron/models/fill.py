"""Fill every parameter from the counter generator: the same seed gives the same model at every layout.

Each number depends on (seed, canonical name, index in the whole tensor) alone, whichever rank holds it.
"""

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from slope_megatron.layers.masked_weight import MaskedWeight
from slope_megatron.layers.packed_weight import PackedWeight, Region
from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.models.canonical import Shard, shards
from slope_megatron.models.rules import ADAPTER, ONE, ZERO, initial_std
from slope_megatron.sparsity import counter
from slope_megatron.sparsity.pieces import pieces


@torch.no_grad()
def fill_model(model: torch.nn.Module, *, seed: int, init_std: float, num_layers: int) -> None:
    """Fill all parameters and patterns in place, and mark what tensor parallelism cuts.

    Args:
        num_layers: blocks of the whole model, over all pipeline stages.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    first_local_row: dict[str, int] = {}
    for shard in shards(model):
        parameter = parameters.get(shard.local_name)
        if parameter is None:
            continue
        if shard.cut_axis is not None and not getattr(parameter, "tensor_model_parallel", False):
            # Megatron marks its own parameters where it initialises them, which is switched off.
            set_tensor_model_parallel_attributes(parameter, True, shard.cut_axis, 1)
        std = initial_std(shard.local_name, init_std, num_layers)
        owner_name, _, leaf = shard.local_name.rpartition(".")
        owner = modules[owner_name]
        if isinstance(owner, PackedWeight) and leaf == "weight":
            start = first_local_row.get(shard.local_name, 0)
            first_local_row[shard.local_name] = start + shard.data.shape[0]
            owner.fill_weight(seed, packed_region(shard, start, owner), std)
        else:
            fill_dense(shard, seed, std)
    choose_derived(model)


@torch.no_grad()
def fill_adapters(model: torch.nn.Module, *, seed: int) -> list[torch.nn.Parameter]:
    """Both factors of every adapter as they start, L standard normal and R zero; returns them."""
    parameters = dict(model.named_parameters())
    adapters = {name: parameter for name, parameter in parameters.items() if ADAPTER.search(name)}
    for shard in shards(model):
        if shard.local_name in adapters:
            fill_dense(shard, seed, std=1.0)
    return list(adapters.values())


def choose_derived(model: torch.nn.Module) -> None:
    """The second pruning of packed weights and the masks of masked ones, from weights that were just written."""
    for module in sparse_modules(model):
        module.update_column_pattern()
    for masked in masked_modules(model):
        masked.update_mask()


def packed_region(shard: Shard, first_local_row: int, owner: PackedWeight) -> Region:
    """Where a shard of packed values lies in the dense weight."""
    n, m = owner.slope.n, owner.slope.m
    return Region(
        name=shard.name,
        local_rows=range(first_local_row, first_local_row + shard.data.shape[0]),
        first_row=shard.offset[0],
        first_column=shard.offset[1] * m // n,
        row_length=shard.shape[1] * m // n,
    )


def fill_dense(shard: Shard, seed: int, std: float) -> None:
    """A parameter that is not packed: ones, zeros, or normal numbers at canonical indices."""
    if ONE.search(shard.local_name):
        shard.data.fill_(1.0)
        return
    if ZERO.search(shard.local_name):
        shard.data.zero_()
        return
    first_row, first_column = shard.offset
    columns = range(first_column, first_column + shard.data.shape[1])
    key = counter.key_of(seed, shard.name)
    for local in pieces(range(shard.data.shape[0]), len(columns), shard.data.device):
        rows = range(first_row + local.start, first_row + local.stop)
        numbers = counter.normal(key, rows, columns, shard.shape[1], shard.data.device)
        shard.data[local.start : local.stop] = numbers * std


def sparse_modules(model: torch.nn.Module) -> list[PackedWeight]:
    """The model's packed linears."""
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def masked_modules(model: torch.nn.Module) -> list[MaskedWeight]:
    """The model's masked linears: the baselines'."""
    return [module for module in model.modules() if isinstance(module, MaskedWeight)]


def pruned_modules(model: torch.nn.Module) -> list[PrunedLinear]:
    """Both."""
    return [module for module in model.modules() if isinstance(module, PrunedLinear)]
