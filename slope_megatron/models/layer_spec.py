"""Layer specs: Megatron's own, with the block linears and the core attention replaced; the linears of a built model.

The stock local spec is taken as it comes from the installed megatron-core and only its leaves are exchanged, so what
Megatron changes around them (norms, bias-dropout-add, checkpoint key maps) is inherited.
"""

import copy
import dataclasses
import functools
import logging
from typing import Any, TypeAlias

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.attention import SdpaAttention
from slope_megatron.layers.column_parallel import SlopeColumnParallelLinear
from slope_megatron.layers.marks import mark
from slope_megatron.layers.masked_parallel import MaskedColumnParallelLinear, MaskedRowParallelLinear
from slope_megatron.layers.masked_weight import MaskedWeight
from slope_megatron.layers.norm import own_norm
from slope_megatron.layers.packed_weight import PackedWeight
from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.layers.row_parallel import SlopeRowParallelLinear
from slope_megatron.models.rules import sparse_linears

logger = logging.getLogger(__name__)
BlockLinear: TypeAlias = ColumnParallelLinear | RowParallelLinear
# Column- and row-parallel linear of SLoPe and of the baselines; a dense model keeps Megatron's.
PACKED = (SlopeColumnParallelLinear, SlopeRowParallelLinear)
MASKED = (MaskedColumnParallelLinear, MaskedRowParallelLinear)


def sparsify(spec: ModuleSpec, slope: SlopeConfig, block: int, rotary_base: int | None = None) -> ModuleSpec:
    """A copy of one block's spec with its sparse linears, Megatron's core attention and torch's norms replaced.

    Raises:
        ValueError: the block is no attention + MLP or experts: its linears would silently stay dense.
    """
    spec = copy.deepcopy(spec)  # the stock specs share their submodule objects
    attention = spec.submodules.self_attention.submodules
    mlps = mlps_of(spec)
    if attention.core_attention is DotProductAttention:  # Transformer Engine's has flash kernels of its own
        attention.core_attention = SdpaAttention if rotary_base is None else SdpaAttention.configured(rotary_base)
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(spec.submodules, name, own_norm(getattr(spec.submodules, name)))
    for name in ("q_layernorm", "k_layernorm"):
        setattr(attention, name, own_norm(getattr(attention, name)))
    own = slope.for_block(block)
    column, row = (linear.configured(own) for linear in (MASKED if own.baseline else PACKED))
    replacements = {
        "linear_qkv": ([attention], column),
        "linear_proj": ([attention], row),
        "linear_fc1": (mlps, column),
        "linear_fc2": (mlps, row),
    }
    for name in sparse_linears(slope, block):
        holders, linear = replacements[name]
        for holder in holders:
            setattr(holder, name, linear)
    return spec


def mlps_of(spec: ModuleSpec) -> list[MLPSubmodules]:
    """What holds the linears of one block's MLP: one; or the routed experts' and the shared ones'.

    Grouped experts become sequential ones, in `spec` itself: a packed weight has a product of its own.

    Raises:
        ValueError: it is neither.
    """
    mlp = submodules_of(spec.submodules.mlp)
    if hasattr(mlp, "linear_fc1"):
        return [mlp]
    if not hasattr(mlp, "experts"):
        raise ValueError(
            "the MLP of this layer spec has neither linear_fc1 and linear_fc2 nor experts: it would stay dense; give a "
            "spec with Megatron's MLP or MoELayer"
        )
    is_partial = isinstance(mlp.experts, functools.partial)
    if (mlp.experts.func if is_partial else mlp.experts.module) is not SequentialMLP:
        say_sequential()
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        build = functools.partial if is_partial else ModuleSpec
        mlp.experts = build(SequentialMLP, submodules=linears)
    return [submodules_of(part) for part in (mlp.experts, mlp.shared_experts) if part is not None]


@functools.cache
def say_sequential() -> None:
    logger.warning(
        "grouped experts (--moe-grouped-gemm) run one after another here: each packed weight has products of its own"
    )


def submodules_of(builder: Any) -> Any:
    """Of a part of a spec: a ModuleSpec or, in later cores, a bound builder; None: it has none."""
    if isinstance(builder, functools.partial):
        return builder.keywords.get("submodules")
    return getattr(builder, "submodules", None)


def stage_specs(
    stock: ModuleSpec | list[ModuleSpec],
    slope: SlopeConfig,
    config,
    rotary_base: int | None = None,
    vp_stage: int | None = None,
) -> list[ModuleSpec]:
    """The stock spec, one for all blocks or each its own, as each block of this pipeline stage has it.

    Args:
        vp_stage: which of the stage's parts, under a virtual pipeline.
    """
    first, count = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage)
    stocks = stock if isinstance(stock, list) else [stock] * count
    return [sparsify(one, slope, first + index, rotary_base) for index, one in enumerate(stocks)]


def block_spec(slope: SlopeConfig, transformer_config, rotary_base: int | None = None) -> TransformerBlockSubmodules:
    """The specs of this pipeline stage's blocks; which linears are sparse may differ from block to block.

    Args:
        rotary_base: of rotary positions, which attention then applies instead of the model; None: it does not.
    """
    stock = get_gpt_layer_local_spec(
        normalization=transformer_config.normalization, qk_layernorm=transformer_config.qk_layernorm
    )
    specs = stage_specs(stock, slope, transformer_config, rotary_base)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=specs[0].submodules.input_layernorm)


def mark_head_norms(model: LanguageModule) -> None:
    """Norms of query and key heads see this rank's heads alone: their gradients are summed over tensor-parallel ranks.

    That is what Megatron's `sequence_parallel` mark asks for, here whether or not the sequence is cut.
    """
    for layer in model.decoder.layers:
        for name, parameter in layer.self_attention.named_parameters():
            if name.startswith(("q_layernorm.", "k_layernorm.")):
                mark(parameter, sequence_parallel=True)


def block_linears(layer: TransformerLayer) -> dict[str, BlockLinear]:
    """The four linears of one built transformer block, by Megatron's names."""
    return {
        "linear_qkv": layer.self_attention.linear_qkv,
        "linear_proj": layer.self_attention.linear_proj,
        "linear_fc1": layer.mlp.linear_fc1,
        "linear_fc2": layer.mlp.linear_fc2,
    }


def linears_to_prune(model: LanguageModule, slope: SlopeConfig) -> list[tuple[BlockLinear, SlopeConfig]]:
    """The linears that the sparse model prunes, with their block's settings, whether `model` is that one or dense."""
    return [
        (linear, slope.for_block(layer.layer_number - 1))
        for layer in model.decoder.layers
        for name, linear in block_linears(layer).items()
        if name in sparse_linears(slope, layer.layer_number - 1)
    ]


def weights_to_prune(model: LanguageModule, slope: SlopeConfig) -> dict[torch.nn.Parameter, SlopeConfig]:
    """The weights that are pruned in the sparse model, whether `model` is that one or its dense baseline."""
    method = "slope" if slope.method == "dense" else slope.method
    sparse = slope if slope.enabled else dataclasses.replace(slope, enabled=True, method=method)
    return {linear.weight: own for linear, own in linears_to_prune(model, sparse)}


def sparse_modules(model: torch.nn.Module) -> list[PackedWeight]:
    """The model's packed linears."""
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def masked_modules(model: torch.nn.Module) -> list[MaskedWeight]:
    """The model's masked linears: the baselines'."""
    return [module for module in model.modules() if isinstance(module, MaskedWeight)]


def pruned_modules(model: torch.nn.Module) -> list[PrunedLinear]:
    """Both."""
    return [module for module in model.modules() if isinstance(module, PrunedLinear)]
