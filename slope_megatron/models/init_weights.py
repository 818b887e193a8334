"""Initial weights from the counter generator: the same seed gives the same model at every layout.

Each number depends on (seed, canonical name, index in the whole tensor) alone, whichever rank holds it.
"""

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from slope_megatron.layers.packed_weight import PackedWeight, Region
from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.models.bert import PostNormLayer
from slope_megatron.models.canonical import Shard, shards
from slope_megatron.models.layer_spec import masked_modules, sparse_modules
from slope_megatron.models.rules import ADAPTER, EMBEDDING, ONE, ZERO, initial_std
from slope_megatron.sparsity import counter
from slope_megatron.sparsity.pieces import pieces


@torch.no_grad()
def init_weights(
    model: torch.nn.Module,
    *,
    seed: int,
    init_std: float,
    num_layers: int,
    embedding_std: float | None = None,
    norm_weight: float = 1.0,
) -> None:
    """Write all parameters and patterns in place, and mark what tensor parallelism cuts.

    Args:
        num_layers: blocks of the whole model, over all pipeline stages.
        embedding_std: of embeddings, also where they are the output layer; None: `init_std`.
        norm_weight: of norms; 0 where they multiply by 1 + weight.
    Raises:
        ValueError: what `check_norms` raises.
    """
    check_norms(model)
    parameters = dict(model.named_parameters())
    for shard in shards(model):
        if shard.local_name not in parameters:
            continue
        mark_cut(parameters[shard.local_name], shard)
        std = initial_std(shard.local_name, init_std, num_layers)
        # By its name in the whole model: a last stage's copy of tied embeddings has another here.
        if embedding_std is not None and EMBEDDING.search(shard.name):
            std = embedding_std
        if isinstance(shard.owner, PackedWeight) and shard.leaf == "weight":
            shard.owner.init_weight(seed, packed_region(shard, shard.owner), std)
        else:
            init_shard(shard, seed, std, norm_weight)
    choose_derived(model)


def check_norms(model: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: a norm was within the linear that a sparse one has replaced, as in Transformer Engine's specs.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, TransformerLayer) or isinstance(layer, PostNormLayer):
            continue
        linears = {
            "input_layernorm": getattr(layer.self_attention, "linear_qkv", None),
            "pre_mlp_layernorm": getattr(layer.mlp, "linear_fc1", None),
        }
        for norm, linear in linears.items():
            if isinstance(linear, PrunedLinear) and isinstance(getattr(layer, norm), IdentityOp):
                raise ValueError(
                    f"{name}.{norm} is an IdentityOp in front of a sparse linear: this spec's norm was within the "
                    f"linear that it replaced; set {norm} in the spec, to TENorm or WrappedTorchNorm, or start from "
                    "get_gpt_layer_local_spec"
                )


@torch.no_grad()
def init_adapters(model: torch.nn.Module, *, seed: int) -> list[torch.nn.Parameter]:
    """Both factors of every adapter as they start, L standard normal and R zero; returns them."""
    adapters = {name: parameter for name, parameter in model.named_parameters() if ADAPTER.search(name)}
    for shard in shards(model):
        if shard.local_name in adapters:
            init_shard(shard, seed, std=1.0)
    return list(adapters.values())


def mark_cut(parameter: torch.nn.Parameter, shard: Shard) -> None:
    """Mark a parameter that is cut over ranks. Megatron does it where it initialises, which is switched off."""
    if shard.cut_axis is not None and not getattr(parameter, "tensor_model_parallel", False):
        set_tensor_model_parallel_attributes(parameter, True, shard.cut_axis, 1)


def choose_derived(model: torch.nn.Module) -> None:
    """The second pruning of packed weights, the masks and scales of masked ones, from weights just written."""
    for module in sparse_modules(model):
        module.update_column_pattern()
    for masked in masked_modules(model):
        masked.choose_scale()
        masked.update_mask()


def packed_region(shard: Shard, owner: PackedWeight) -> Region:
    """Where a shard of packed values lies in the dense weight."""
    n, m = owner.slope.n, owner.slope.m
    return Region(
        name=shard.name,
        local_rows=range(shard.first_local_row, shard.first_local_row + shard.data.shape[0]),
        first_row=shard.offset[0],
        first_column=shard.offset[1] * m // n,
        row_length=shard.shape[1] * m // n,
    )


def init_shard(shard: Shard, seed: int, std: float, norm_weight: float = 1.0) -> None:
    """A parameter that is not packed: of a norm, zeros, or normal numbers at canonical indices."""
    if ONE.search(shard.local_name):
        shard.data.fill_(norm_weight)
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
