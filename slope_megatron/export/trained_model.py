"""A trained model as a mapping `{canonical name: tensor}`, in one process, without Megatron and DeepSpeed.

The checkpoint is read by whole tensors, whatever layout wrote it. Left out: the optimizer, the second pruning (only
training needs it), adapters that had not joined yet, and the rows that pad the vocabulary. A baseline's weight comes
as it is multiplied.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from slope_megatron.config import Config, ModelConfig
from slope_megatron.data.fast_tokenizer import FastTokenizer
from slope_megatron.data.tokenizer import Tokenizer
from slope_megatron.models.shapes import VOCABULARY_ROWS
from slope_megatron.sparsity.packing import unpack, unpack_bits
from slope_megatron.sparsity.soft_threshold import BESIDE, arguments, as_multiplied

OPTIMIZER = ("optimizer.", "chained_")
LEFT_OUT = (".weight_column", "_extra_state")
OTHER_STEP = "take another checkpoint with --step"
ADAPTERS = (".adapter_l", ".adapter_r")


class TrainedModel(Mapping[str, torch.Tensor]):
    """See the module's docstring. A subclass sets what is declared here, `adapters_active` before `open_tensors`."""

    model: ModelConfig
    config: Config
    # Optimizer steps made.
    step: int
    # Entries of the vocabulary: rows behind them pad it.
    vocabulary: int
    adapters_active: bool

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | FastTokenizer | None:
        """The one that the model was trained with; None: it is not there any more."""
        raise NotImplementedError

    def open_tensors(self, folder: Path) -> None:
        """
        Args:
            folder: of the checkpoint; those of its tensors count that the settings above say.
        """
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        from slope_megatron.models.stored_tensors import StoredTensors
        from slope_megatron.storage.tensors import CheckedReader

        reader = CheckedReader(folder, OTHER_STEP)
        entries = reader.read_metadata().state_dict_metadata
        counting = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and self._counts(name)
        }
        self.tensors = StoredTensors(reader, counting)
        self.names = [name for name in self.tensors.places if not name.endswith(BESIDE)]

    def _counts(self, name: str) -> bool:
        if name.startswith(OPTIMIZER) or any(part in name for part in LEFT_OUT):
            return False
        return self.adapters_active or not name.endswith(ADAPTERS)

    # -- tensors ------------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor; without the padding of the vocabulary."""
        stored = self.tensors.places[name].shape
        return (min(stored[0], self.vocabulary), *stored[1:]) if name in VOCABULARY_ROWS else stored

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors.places[name].dtype

    def __contains__(self, name: object) -> bool:
        return name in self.tensors.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read([name])[name]

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Some tensors at once.

        Raises:
            ValueError: they are not what was written.
        """
        read = {name: arguments(name, self.tensors.places) for name in names}
        state = self.tensors.read([*itertools.chain(*read.values())])
        whole = {name: as_multiplied(*(state[one] for one in read[name])) for name in names}
        return {
            name: tensor[: self.vocabulary] if name in VOCABULARY_ROWS else tensor for name, tensor in whole.items()
        }

    # -- dense --------------------------------------------------------------------------------------------------------

    def is_packed(self, name: str) -> bool:
        return f"{name}_pattern" in self.tensors.places

    def has_adapter(self, name: str) -> bool:
        """Whether the linear with this weight has adapters that take part."""
        return f"{name.removesuffix('.weight')}.adapter_l" in self.tensors.places

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """Of the dense tensor."""
        rows, *rest = self.shape(name)
        return (rows, 8 * self.shape(f"{name}_pattern")[1]) if self.is_packed(name) else (rows, *rest)

    def dense(self, name: str, fold: bool) -> torch.Tensor:
        """The dense tensor: zeros where pruned. `fold` adds (1/R) (L R)^T, summed in fp32 at least, then rounded."""
        linear = name.removesuffix(".weight")
        names = [name, f"{name}_pattern"] if self.is_packed(name) else [name]
        folded = fold and name.endswith(".weight") and self.has_adapter(name)
        stored = self.read([*names, *(linear + leaf for leaf in ADAPTERS)] if folded else names)
        weight = stored[name]
        if self.is_packed(name):
            weight = unpack(weight, unpack_bits(stored[f"{name}_pattern"]))
        if not folded:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        left, right = (stored[linear + leaf].to(wide) for leaf in ADAPTERS)
        return torch.addmm(weight.to(wide), right, left, alpha=1.0 / len(left)).to(weight.dtype)
