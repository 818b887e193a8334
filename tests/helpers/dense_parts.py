"""A built model back as dense canonical tensors: the dense model that computes the same."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch


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
    from slope_megatron.layers.masked_weight import MaskedWeight
    from slope_megatron.layers.packed_weight import PackedWeight
    from slope_megatron.models.canonical import shards
    from slope_megatron.models.init_weights import packed_region

    for shard in shards(model):
        owner = shard.owner
        if not isinstance(owner, PackedWeight | MaskedWeight) or shard.leaf == "bias":
            yield DensePart(shard.name, shard.data.detach(), shard.shape, shard.offset, shard.main)
        elif shard.leaf == "weight":
            rows = slice(shard.first_local_row, shard.first_local_row + shard.data.shape[0])
            shape, offset = shard.shape, shard.offset
            if isinstance(owner, PackedWeight):
                region = packed_region(shard, owner)
                shape, offset = (shard.shape[0], region.row_length), (shard.offset[0], region.first_column)
            yield DensePart(shard.name, dense_rows(owner, rows), shape, offset, shard.main)


def dense_rows(owner, rows: slice) -> torch.Tensor:
    """Some local rows of what is multiplied (+ (1/R) R^T L^T where the adapters are active), `[rows, K]`."""
    dense = owner.dense_weight()[rows]
    if owner.adapters_active:
        dense = torch.addmm(dense, owner.adapter_r[rows], owner.adapter_l, alpha=1.0 / owner.adapter_l.shape[0])
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
        region = tuple(slice(at, at + size) for at, size in zip(part.offset, part.data.shape, strict=True))
        whole[part.name][region] = part.data.cpu()
        covered[part.name] = covered.get(part.name, 0) + part.data.numel()
    for name, tensor in whole.items():
        if covered[name] != tensor.numel():
            raise ValueError(
                f"{covered[name]} of {tensor.numel()} elements of {name} are there: give the parts of all "
                "tensor-parallel and pipeline ranks of one replica"
            )
    return whole
