"""Dense weights into a built model, at any layout; packed linears are pruned as their weights are read.

Pruning commutes with sharding: a group is M neighbours of one row, and no shard cuts a group. So pruning each shard on
load gives what pruning the whole tensor and cutting it would.
"""

from collections.abc import Mapping

import torch

from slope_megatron.config import Config
from slope_megatron.layers.packed_weight import PackedWeight, Region
from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.models.canonical import Shard, shards
from slope_megatron.models.init_weights import choose_derived, init_shard, mark_cut, packed_region
from slope_megatron.models.shapes import VOCABULARY_ROWS, canonical_shapes
from slope_megatron.sparsity import counter
from slope_megatron.sparsity.packing import pack, pack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern, random_pattern
from slope_megatron.sparsity.pieces import pieces

PATTERNS = ("magnitude", "random")
# Buffers of a pruned linear: chosen here, never read from a dense model.
DERIVED = ("weight_pattern", "weight_column", "weight_mask", "weight_scale")
ADAPTERS = ("adapter_l", "adapter_r")


@torch.no_grad()
def load_dense(
    model: torch.nn.Module,
    config: Config,
    source: Mapping[str, torch.Tensor],
    pattern: str = "magnitude",
    masks: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Give a built model the weights of a dense one, whatever it held before.

    Args:
        source: canonical name -> whole dense tensor, asked once for each tensor that has a part here. Embeddings may
            have fewer rows than the padded vocabulary: the rest is zero.
        pattern: which weights of a packed linear stay: the largest ones, or the seed's random pattern, the one that
            training from the first step would have.
        masks: instead of a pattern, `{packed weight's name in the model: bool [N, K] of this rank}`.

    Adapters start as in training: L random, R zero. Operands and the column patterns are made anew.

    Raises:
        ValueError: a tensor is missing, has another shape, or belongs to no part of this model.
    """
    if masks is None and pattern not in PATTERNS:
        raise ValueError(f"the pattern to prune with is {pattern!r}: it must be one of {', '.join(PATTERNS)}")
    check_names(config, source)
    fill_dense(model, source, config.train.seed, pattern, masks)


@torch.no_grad()
def fill_dense(
    model: torch.nn.Module,
    source: Mapping[str, torch.Tensor],
    seed: int,
    pattern: str,
    masks: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`load_dense` of a model whose names are known to be those of `source`, of any architecture."""
    parameters = dict(model.named_parameters())
    for shard in shards(model):
        owner = shard.owner
        if shard.local_name in parameters:
            mark_cut(parameters[shard.local_name], shard)
        pruned = isinstance(owner, PrunedLinear)
        if pruned and shard.leaf in DERIVED:
            continue
        if pruned and shard.leaf in ADAPTERS:
            init_shard(shard, seed, 1.0)
        elif isinstance(owner, PackedWeight) and shard.leaf == "weight":
            region = packed_region(shard, owner)
            whole = checked(source[shard.name], shard.name, (shard.shape[0], region.row_length))
            mask = masks[shard.local_name] if masks is not None else None
            prune_into(owner, region, whole, pattern, seed, mask)
        else:
            copy_part(shard, source[shard.name])
    choose_derived(model)


def check_names(config: Config, source: Mapping) -> None:
    """Refuse tensors that no rank would read, and the lack of one. Names do not depend on vocabulary or positions."""
    names = set(canonical_shapes(config.model, rows=1, positions=1))
    if unknown := sorted(set(source) - names):
        raise ValueError(
            f"the dense weights have {len(unknown)} tensors with no place in this model, {unknown[0]} for one: give "
            "those of the same architecture, by canonical names"
        )
    if missing := sorted(names - set(source)):
        raise ValueError(f"the dense weights have no {missing[0]}: give all tensors of the same architecture")


def checked(tensor: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"the dense weight {name} has shape {tuple(tensor.shape)}: this model has {tuple(shape)} there; give "
            "weights of the same architecture, whole and not packed"
        )
    return tensor


def copy_part(shard: Shard, whole: torch.Tensor) -> None:
    """This rank's part of a tensor that is not packed; rows of the vocabulary that `whole` lacks are zero."""
    rows = shard.shape[0]
    if shard.name in VOCABULARY_ROWS:
        rows = min(rows, whole.shape[0])
    checked(whole, shard.name, (rows, *shard.shape[1:]))
    part = whole[tuple(slice(at, at + size) for at, size in zip(shard.offset, shard.data.shape, strict=True))]
    shard.data[: part.shape[0]].copy_(part)
    shard.data[part.shape[0] :].zero_()


def prune_into(
    owner: PackedWeight,
    region: Region,
    whole_NK: torch.Tensor,
    pattern: str,
    seed: int,
    own_mask: torch.Tensor | None = None,
) -> None:
    """Row pattern and values of one region of a packed linear, from the whole dense weight `[N, K]`.

    Args:
        own_mask: of all of this rank's rows, instead of `pattern`.
    """
    n, m, device = owner.slope.n, owner.slope.m, owner.weight.device
    columns = range(region.first_column, region.first_column + owner.weight_pattern.shape[1] * 8)
    key = counter.key_of(seed, f"{region.name}_pattern")
    for local in pieces(region.local_rows, len(columns), device):
        rows = region.rows(local)
        dense = whole_NK[rows.start : rows.stop, columns.start : columns.stop].to(device)
        if own_mask is not None:
            mask = own_mask[local.start : local.stop]
        elif pattern == "random":
            mask = random_pattern(counter.bits(key, rows, columns, region.row_length, device), n, m)
        else:
            mask = magnitude_pattern(dense, n, m)
        owner.weight[local.start : local.stop] = pack(dense, mask).to(owner.weight.dtype)
        owner.weight_pattern[local.start : local.stop] = pack_bits(mask)
    owner.mark_present("weight", "weight_pattern")
    owner.drop_operands()
