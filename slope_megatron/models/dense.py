"""Dense weights into a built model, at any layout, and back out of it.

    load_dense    {canonical name: whole dense tensor} -> this rank's shards; packed linears are pruned as they are read
    dense_parts   this rank's shards as parts of dense canonical tensors
    assemble      the parts of all ranks as whole tensors

Pruning commutes with sharding: a group is M neighbours of one row, and no shard cuts a group. So pruning each shard on
load gives what pruning the whole tensor and cutting it would.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from slope_megatron.config import Config
from slope_megatron.layers.masked_weight import MaskedWeight
from slope_megatron.layers.packed_weight import PackedWeight, Region
from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.models.canonical import Shard, shards
from slope_megatron.models.fill import choose_derived, fill_dense, packed_region
from slope_megatron.models.shapes import VOCABULARY_ROWS, canonical_shapes
from slope_megatron.sparsity import counter
from slope_megatron.sparsity.packing import pack, pack_bits, unpack, unpack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern, random_pattern
from slope_megatron.sparsity.pieces import pieces

PATTERNS = ("magnitude", "random")
# Buffers of a pruned linear: chosen here, never read from a dense model.
DERIVED = ("weight_pattern", "weight_column", "weight_mask")
ADAPTERS = ("adapter_l", "adapter_r")

Source = Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor]


# -- dense -> this rank's shards ---------------------------------------------------------------------------------------


@torch.no_grad()
def load_dense(
    model: torch.nn.Module,
    config: Config,
    source: Source,
    pattern: str = "magnitude",
    masks: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Fill a built model, bare or filled, with the weights of a dense one.

    Args:
        source: canonical name -> whole dense tensor; a callable is asked once for each tensor that has a part here.
            Embeddings may have fewer rows than the padded vocabulary: the rest is zero.
        pattern: which weights of a packed linear stay: the largest ones, or the seed's random pattern, the one that
            training from the first step would have.
        masks: instead of a pattern, `{packed weight's name in the model: bool [N, K] of this rank}`.

    Adapters start as in training: L random, R zero. Operands and the column patterns are made anew.

    Raises:
        ValueError: a tensor is missing, has another shape, or belongs to no part of this model.
    """
    if masks is None and pattern not in PATTERNS:
        raise ValueError(f"the pattern to prune with is {pattern!r}: it must be one of {', '.join(PATTERNS)}")
    if isinstance(source, Mapping):
        refuse_unknown(config, source)
    fetch = lookup(source)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    first_local_row: dict[str, int] = {}
    for shard in shards(model):
        owner_name, _, leaf = shard.local_name.rpartition(".")
        owner = modules.get(owner_name)
        if shard.local_name in parameters and shard.cut_axis is not None:
            # Megatron marks its own parameters where it initialises them, which is switched off.
            mark_cut(parameters[shard.local_name], shard.cut_axis)
        pruned = isinstance(owner, PrunedLinear)
        if pruned and leaf in DERIVED:
            continue
        if pruned and leaf in ADAPTERS:
            fill_dense(shard, config.train.seed, 1.0)
        elif isinstance(owner, PackedWeight) and leaf == "weight":
            start = first_local_row.get(shard.local_name, 0)
            first_local_row[shard.local_name] = start + shard.data.shape[0]
            region = packed_region(shard, start, owner)
            whole = checked(fetch(shard.name), shard.name, (shard.shape[0], region.row_length))
            mask = masks[shard.local_name] if masks is not None else None
            prune_into(owner, region, whole, pattern, config.train.seed, mask)
        else:
            copy_part(shard, fetch(shard.name))
    choose_derived(model)


def mark_cut(parameter: torch.nn.Parameter, axis: int) -> None:
    if not getattr(parameter, "tensor_model_parallel", False):
        set_tensor_model_parallel_attributes(parameter, True, axis, 1)


def refuse_unknown(config: Config, source: Mapping) -> None:
    """Refuse tensors that no rank would read. The names do not depend on the vocabulary's or the table's rows."""
    unknown = sorted(set(source) - set(canonical_shapes(config.model, rows=1, positions=1)))
    if unknown:
        raise ValueError(
            f"the dense weights have {len(unknown)} tensors with no place in this model, {unknown[0]} for one: give "
            "those of the same architecture, by canonical names"
        )


def lookup(source: Source) -> Callable[[str], torch.Tensor]:
    if not isinstance(source, Mapping):
        return source

    def fetch(name: str) -> torch.Tensor:
        if name not in source:
            raise ValueError(f"the dense weights have no {name}: give all tensors of the same architecture")
        return source[name]

    return fetch


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


# -- this rank's shards -> dense ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DensePart:
    """A part of one dense tensor: `data` lies at `offset` of the whole of shape `shape`."""

    name: str
    data: torch.Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    main: bool


@torch.no_grad()
def dense_parts(model: torch.nn.Module) -> Iterator[DensePart]:
    """This rank's part of the dense model that computes the same: zeros where pruned, active adapters added in.

    Parts of which another rank holds the same have `main` False, but for one.
    """
    modules = dict(model.named_modules())
    first_local_row: dict[str, int] = {}
    for shard in shards(model):
        owner_name, _, leaf = shard.local_name.rpartition(".")
        owner = modules.get(owner_name)
        if not isinstance(owner, PackedWeight | MaskedWeight) or leaf == "bias":
            yield DensePart(shard.name, shard.data.detach(), shard.shape, shard.offset, shard.main)
        elif leaf == "weight":
            start = first_local_row.get(shard.local_name, 0)
            first_local_row[shard.local_name] = start + shard.data.shape[0]
            rows = range(start, start + shard.data.shape[0])
            shape, offset = shard.shape, shard.offset
            if isinstance(owner, PackedWeight):
                region = packed_region(shard, start, owner)
                shape, offset = (shard.shape[0], region.row_length), (shard.offset[0], region.first_column)
            yield DensePart(shard.name, dense_rows(owner, rows), shape, offset, shard.main)


def dense_rows(owner: PackedWeight | MaskedWeight, rows: range) -> torch.Tensor:
    """Some local rows of what is multiplied (+ (1/R) R^T L^T where the adapters are active), `[rows, K]`."""
    part = slice(rows.start, rows.stop)
    if isinstance(owner, MaskedWeight):
        dense = owner.dense_weight()[part]
    else:
        dense = unpack(owner.weight[part].detach(), unpack_bits(owner.weight_pattern[part]))
    if owner.adapters_active:
        dense = torch.addmm(dense, owner.adapter_r[part], owner.adapter_l, alpha=1.0 / owner.adapter_l.shape[0])
    return dense


def assemble(parts: Iterable[DensePart]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, from the parts of all ranks of one replica.

    Raises:
        ValueError: a tensor is not covered by the main parts.
    """
    whole: dict[str, torch.Tensor] = {}
    covered: dict[str, int] = {}
    for part in parts:
        if not part.main:
            continue
        if part.name not in whole:
            whole[part.name] = torch.empty(part.shape, dtype=part.data.dtype)
        place = tuple(slice(at, at + size) for at, size in zip(part.offset, part.data.shape, strict=True))
        whole[part.name][place] = part.data.cpu()
        covered[part.name] = covered.get(part.name, 0) + part.data.numel()
    for name, tensor in whole.items():
        if covered[name] != tensor.numel():
            raise ValueError(
                f"{covered[name]} of {tensor.numel()} elements of {name} are there: give the parts of all "
                "tensor-parallel and pipeline ranks of one replica"
            )
    return whole
