"""Tensors of a distributed checkpoint by canonical name, whole, read when they are asked for.

Megatron stores a tensor of each block under a name of its own, or those of all blocks as one tensor `[blocks, ...]`;
those of all experts of a block always as one, `[experts, ...]`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from slope_megatron.models.canonical_names import EXPERTS, numbered
from slope_megatron.storage.tensors import CheckedReader, read_tensors

NUMBERED = re.compile(r"^(decoder|encoder)\.layers\.\d+\.")
# A norm before a linear has its own name where the linear is no single one, as under Transformer Engine before experts.
UNFUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: the stored one's name, and its indices on the axes of blocks and experts."""

    stored: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def places(entries: Mapping[str, TensorStorageMetadata]) -> Iterator[tuple[str, Place]]:
    """`(canonical name, place)` of everything that is stored."""
    for stored, entry in entries.items():
        stack, _, leaf = stored.partition(".layers.")
        over_blocks = bool(leaf) and not NUMBERED.match(stored)
        over_experts = EXPERTS in stored
        axes = tuple(entry.size[: over_blocks + over_experts])
        for index in torch.cartesian_prod(*map(torch.arange, axes)).reshape(-1, len(axes)).tolist() if axes else [[]]:
            name = f"{stack}.layers.{index[0]}.{leaf}" if over_blocks else stored
            name = numbered(name, tuple(index[over_blocks:]))
            yield fused(name), Place(stored, tuple(index), tuple(entry.size[len(axes) :]), entry.properties.dtype)


def fused(name: str) -> str:
    """The canonical name of a norm that was stored under its own."""
    for own, canonical in UNFUSED.items():
        name = re.sub(rf"^(decoder\.layers\.\d+\.){re.escape(own)}", rf"\g<1>{canonical}", name)
    return name


class StoredTensors:
    """See the module's docstring.

    Args:
        entries: of the reader's metadata, those that count.
    """

    def __init__(self, reader: CheckedReader, entries: Mapping[str, TensorStorageMetadata]):
        self.reader, self.entries = reader, entries
        self.places = dict(places(entries))
        # What was read last: the next expert's, or block's, may lie in the same tensors.
        self.last: dict[str, torch.Tensor] = {}

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Some tensors at once.

        Raises:
            ValueError: they are not what was written.
        """
        wanted = {self.places[name].stored for name in names}
        found = {stored: self.last[stored] for stored in wanted & self.last.keys()}
        missing = {
            stored: torch.empty(self.entries[stored].size, dtype=self.entries[stored].properties.dtype)
            for stored in wanted - found.keys()
        }
        if missing:
            read_tensors(missing, self.reader)
        stacked = {place.stored for place in map(self.places.__getitem__, names) if place.index}
        whole = {**found, **missing}
        self.last = {stored: whole[stored] for stored in stacked}
        return {name: whole[self.places[name].stored][self.places[name].index] for name in names}
