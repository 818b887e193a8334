"""A Megatron checkpoint on disk as the source of `load_dense`: whole tensors by canonical name, one at a time.

Reads megatron-core's `torch_dist` format (its default), whatever layout wrote it. Both of its layouts of a block's
tensors are understood: one tensor a layer, and all layers in one tensor `[layers, ...]`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from slope_megatron.models.shapes import VOCABULARY_ROWS
from slope_megatron.sparsity.soft_threshold import BESIDE, arguments, as_multiplied
from slope_megatron.storage import metadata
from slope_megatron.storage.tensors import CheckedReader, read_tensors

NO_WEIGHT = re.compile(r"^optimizer\.|^chained_|_extra_state")
LAYER = re.compile(r"^((?:decoder|encoder)\.layers\.)(\d+)\.(.+)$")


class MegatronCheckpoint(Mapping):
    """`{canonical name: whole dense tensor}` of a checkpoint folder; tensors are read when they are asked for.

    A weight beside which a mask lies (`X.weight_mask`, a baseline's bitmask) comes as it is multiplied.

    Args:
        vocabulary: entries that count; Megatron-LM's padding depends on its tensor-parallel size, so the rows behind
            them are left out.
    Raises:
        ValueError: no such checkpoint, one without a dense model, or what `CheckedReader` says no to.
    """

    def __init__(self, folder: Path | str, vocabulary: int | None = None):
        self.folder = Path(folder)
        if not (self.folder / metadata.NAME).is_file():
            found = "holds no Megatron checkpoint of the torch_dist format" if self.folder.is_dir() else "is no folder"
            raise ValueError(
                f"{self.folder} {found}: give a run folder, a folder that `slope import hf` wrote, or that of one "
                "iteration of Megatron-LM, such as iter_0001000"
            )
        self.vocabulary = vocabulary
        self.reader = CheckedReader(self.folder)
        entries = self.reader.read_metadata().state_dict_metadata
        self.stored: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in entries.items()
            # Optimizer states lie beside the model under names of their own.
            if isinstance(entry, TensorStorageMetadata) and not NO_WEIGHT.search(name)
        }
        self.masks = {name: self.stored.pop(name) for name in list(self.stored) if name.endswith(BESIDE)}
        packed = next((name for name in self.stored if name.endswith(".weight_pattern")), None)
        if packed:
            raise ValueError(f"{self.folder} holds a packed model ({packed}): resume from it, or give a dense one")
        self.locations = dict(self._locations())

    def _locations(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Canonical name -> (stored name, index on the layers' axis)."""
        for name, entry in self.stored.items():
            stack, _, leaf = name.partition(".layers.")
            if not leaf or LAYER.match(name):
                yield name, (name, None)
            else:
                yield from ((f"{stack}.layers.{i}.{leaf}", (name, i)) for i in range(entry.size[0]))

    def __getitem__(self, name: str) -> torch.Tensor:
        stored, layer = self.locations[name]
        entries = {**self.stored, **self.masks}
        read = arguments(stored, self.masks)
        state = {one: torch.empty(entries[one].size, dtype=entries[one].properties.dtype) for one in read}
        read_tensors(state, self.reader)
        whole = as_multiplied(*state.values())
        if name in VOCABULARY_ROWS:
            return whole[: self.vocabulary]
        return whole if layer is None else whole[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.locations)

    def __len__(self) -> int:
        return len(self.locations)
