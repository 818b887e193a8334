"""Wanda over a whole model: block after block, each measured behind the blocks that are pruned already.

As published (arXiv 2306.11695, section 3): a block's inputs come out of the pruned blocks before it; the inputs of
its linears are measured with its own weights still dense; then all of them are pruned, and its outputs computed anew.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer

from slope_megatron.config import SlopeConfig
from slope_megatron.models.layer_spec import BlockLinear, block_linears, sparse_linears
from slope_megatron.sparsity.wanda import squared_norms, wanda_mask


class Caught(Exception):
    """Ends a forward pass at the first block."""


@torch.no_grad()
def prune_in_place(
    model: LanguageModule, slope: SlopeConfig, batches: Iterable, call: Callable
) -> dict[str, torch.Tensor]:
    """Prune a dense model, which holds all blocks; the same on every replica that is given the same batches.

    Args:
        slope: of the sparse model: which linears are pruned, and their N:M.
        call: `call(model, batch)` runs one forward pass.
    Returns:
        {the weight's name in the model: its mask, bool `[N, K]`, this rank's shard}.
    """
    model.eval()
    names = {id(module): name for name, module in model.named_modules()}
    inputs = first_block_inputs(model, batches, call)
    masks = {}
    for layer in model.decoder.layers:
        block = layer.layer_number - 1
        own = slope.for_block(block)
        pruned = {name: block_linears(layer)[name] for name in sorted(sparse_linears(slope, block))}
        norms = input_norms(layer, pruned, inputs)
        for name, linear in pruned.items():
            mask = wanda_mask(linear.weight, norms[name], own.n, own.m)
            linear.weight.mul_(mask)
            masks[f"{names[id(linear)]}.weight"] = mask
        for arguments in inputs:
            arguments["hidden_states"] = layer(**arguments)[0]
    return masks


def first_block_inputs(model: LanguageModule, batches: Iterable, call: Callable) -> list[dict]:
    """The keyword arguments that the first block is called with, one set a batch."""
    found = []

    def catch(_module, arguments, keywords):
        assert not arguments, "Megatron calls its blocks by keyword"
        found.append(dict(keywords))
        raise Caught

    hook = model.decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                call(model, batch)
            except Caught:
                continue
    finally:
        hook.remove()
    return found


def input_norms(layer: TransformerLayer, linears: dict[str, BlockLinear], inputs: list[dict]) -> dict:
    """Each linear's sum of squared inputs over all tokens, fp64 `[K]` of this rank."""
    sums: dict[str, torch.Tensor] = {}

    def measure(name):
        def hook(_module, arguments):
            here = squared_norms(arguments[0].flatten(0, -2))
            sums[name] = sums[name] + here if name in sums else here

        return hook

    hooks = [linear.register_forward_pre_hook(measure(name)) for name, linear in linears.items()]
    for arguments in inputs:
        layer(**arguments)
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        if isinstance(linear, ColumnParallelLinear) and linear.sequence_parallel:
            # Each rank has seen its part of the sequence; a row-parallel linear's input is cut along K instead.
            dist.all_reduce(sums[name], group=linear.tp_group)
    return sums
