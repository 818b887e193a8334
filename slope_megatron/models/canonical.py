"""Canonical names: every tensor of a model by the name, and at the indices, that it has in the unsharded model.

The names are the keys of Megatron's own sharded state dict with the global layer number in them, so that the initial
weights and the checkpoints speak of the same things.
"""

import dataclasses
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from slope_megatron.models.canonical_names import numbered


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of one tensor of the whole model, held here.

    Args:
        name: canonical name.
        local_name: the model's own name of the tensor that `data` is a view of.
        owner: the module that holds that tensor.
        data: the view.
        first_local_row: the row of that tensor at which `data` begins.
        shape: shape of the whole tensor.
        offset: where `data` lies in it.
        main: whether this rank's copy is the one that counts (its replicas hold the same).
    """

    name: str
    local_name: str
    owner: torch.nn.Module | None
    data: torch.Tensor
    first_local_row: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    main: bool

    @property
    def leaf(self) -> str:
        """The tensor's name in its module."""
        return self.local_name.rpartition(".")[2]

    @property
    def cut_axis(self) -> int | None:
        """The axis along which the tensor is cut over ranks; None: whole here."""
        return next((axis for axis, size in enumerate(self.data.shape) if size != self.shape[axis]), None)


def sharded_state_dict(model: MegatronModule) -> dict:
    """Megatron's sharded state dict of the model, keys with global layer numbers."""
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": True,
    }
    return model.sharded_state_dict(metadata=metadata)


def shards(model: MegatronModule) -> Iterator[Shard]:
    """All tensors of the model that a checkpoint holds; fused gate and up come as two shards of one name."""
    modules = dict(model.named_modules())
    for local_name, entry in sharded_state_dict(model).items():
        if isinstance(entry, ShardedTensorFactory):
            parts = entry.build()
        elif isinstance(entry, ShardedTensor):
            parts = [entry]
        else:
            continue
        first_local_row = 0
        for part in parts:
            axes = part.prepend_axis_num
            yield Shard(
                name=numbered(part.key, part.global_offset[:axes]),
                local_name=local_name,
                owner=modules.get(local_name.rpartition(".")[0]),
                data=part.data,
                first_local_row=first_local_row,
                shape=tuple(part.global_shape[axes:]),
                offset=tuple(part.global_offset[axes:]),
                main=not any(part.replica_id) if isinstance(part.replica_id, tuple) else part.replica_id == 0,
            )
            first_local_row += part.data.shape[0]
