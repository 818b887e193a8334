"""A Megatron checkpoint on disk as the source of `load_dense`: whole tensors by canonical name, one at a time.

Reads megatron-core's `torch_dist` format (its default), whatever layout wrote it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from slope_megatron.models.shapes import VOCABULARY_ROWS
from slope_megatron.models.stored_tensors import StoredTensors
from slope_megatron.sparsity.soft_threshold import BESIDE, arguments, as_multiplied
from slope_megatron.storage import metadata
from slope_megatron.storage.tensors import CheckedReader

NO_WEIGHT = re.compile(r"^optimizer\.|^chained_|_extra_state")


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
        reader = CheckedReader(self.folder)
        entries = {
            name: entry
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            # Optimizer states lie beside the model under names of their own.
            if isinstance(entry, TensorStorageMetadata) and not NO_WEIGHT.search(name)
        }
        packed = next((name for name in entries if name.endswith(".weight_pattern")), None)
        if packed:
            raise ValueError(f"{self.folder} holds a packed model ({packed}): resume from it, or give a dense one")
        self.tensors = StoredTensors(reader, entries)
        self.names = [name for name in self.tensors.places if not name.endswith(BESIDE)]

    def __getitem__(self, name: str) -> torch.Tensor:
        read = arguments(name, self.tensors.places)
        whole = as_multiplied(*map(self.tensors.read(read).__getitem__, read))
        return whole[: self.vocabulary] if name in VOCABULARY_ROWS else whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
