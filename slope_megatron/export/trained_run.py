"""A run's checkpoint as a mapping `{canonical name: tensor}`, in one process, without Megatron and DeepSpeed.

The checkpoint is read by whole tensors, whatever layout wrote it. Left out: the optimizer, the second pruning (only
training needs it), adapters that had not joined yet, and the rows that pad the vocabulary. A baseline's weight comes
as it is multiplied.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from slope_megatron.config.json_file import read_json
from slope_megatron.config.saved import WEIGHTS, SavedConfig
from slope_megatron.data.fast_tokenizer import FastTokenizer
from slope_megatron.data.tokenizer import Tokenizer, load_tokenizer
from slope_megatron.export.run_tokenizer import check_given, choose_tokenizer, own_tokenizer
from slope_megatron.models.shapes import VOCABULARY_ROWS
from slope_megatron.sparsity.packing import unpack, unpack_bits
from slope_megatron.sparsity.soft_threshold import BESIDE, arguments, as_multiplied
from slope_megatron.storage import latest, sums

STEP = re.compile(r"step_\d{8,}")
LEFT_OUT = (".weight_column", "_extra_state")
OTHER_STEP = "take another checkpoint with --step"
ADAPTERS = (".adapter_l", ".adapter_r")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() or (folder / "checkpoints").is_dir()


def no_run(folder: Path) -> str:
    """Why a folder is no run, and the way out; the folder of a quickstart holds two."""
    if not folder.is_dir():
        return "does not exist: give a run folder" if not folder.exists() else "is a file: give a run folder"
    inside = sorted(str(path) for path in folder.iterdir() if path.is_dir() and is_run(path))
    if inside:
        return f"holds no run itself: give one of {', '.join(inside)}"
    return "holds no run: give a folder that `slope pretrain` wrote to, or OUT/sparse of `slope quickstart`"


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """The checkpoint of a run: of a step, or the newest.

    Raises:
        ValueError: no run, no complete checkpoint, or none of that step.
    """
    if not is_run(run):
        raise ValueError(f"{run} {no_run(run)}")
    sealed = (path.parent for path in (run / "checkpoints").glob("step_*/manifest.json"))
    # Others of that beginning are half-written, or were found corrupt and set aside.
    complete = sorted(folder for folder in sealed if STEP.fullmatch(folder.name))
    if not complete:
        raise ValueError(f"{run} has no complete checkpoint yet: let the run reach one (--save-interval)")
    if step is not None:
        wanted = run / "checkpoints" / f"step_{step:08d}"
        if wanted not in complete:
            steps = ", ".join(str(int(folder.name.removeprefix("step_"))) for folder in complete)
            raise ValueError(f"{run} has no checkpoint of step {step}: it has those of {steps}")
        return wanted
    return latest.find(complete)


class TrainedRun(Mapping[str, torch.Tensor]):
    """See the module's docstring.

    Args:
        run: run folder.
        step: of the checkpoint; None: the newest.
        tokenizer: file or folder that overrides the data's.
    Raises:
        ValueError: what `find_checkpoint` and `SavedConfig.check` raise, a file of the checkpoint is not what was
            written, or the vocabulary's size cannot be known.
    """

    def __init__(self, run: Path | str, step: int | None = None, tokenizer: Path | None = None):
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        from slope_megatron.storage.tensors import CheckedReader

        self.run = Path(run)
        self.folder = find_checkpoint(self.run, step)
        # Those with the tensors are checked as they are read.
        sums.check_folder(self.folder, OTHER_STEP, contents=lambda name: not name.endswith(".distcp"))
        state = read_json(self.folder / "state.json", OTHER_STEP)
        config = SavedConfig.read(state).check(self.folder, WEIGHTS).config()
        # A dense start or tail is saved as such.
        self.config = config.dense_twin if state.get("form") == "dense" else config
        self.step = state["steps_done"]
        self.adapters_active = self.config.slope.adapters_count(self.config.train.steps, self.step)
        self.reader = CheckedReader(self.folder, OTHER_STEP)
        entries = self.reader.read_metadata().state_dict_metadata
        self.entries = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and self._counts(name)
        }
        self.masks = {name: self.entries.pop(name) for name in list(self.entries) if name.endswith(BESIDE)}
        self.tokenizer_folder = choose_tokenizer(self.run, Path(self.config.data.data), tokenizer)
        self.vocabulary = self._vocabulary()
        positions, seq_length = self.entries.get("embedding.position_embeddings.weight"), self.config.data.seq_length
        self.model = dataclasses.replace(
            self.config.model,
            vocab_size=self.vocabulary,
            max_positions=positions.size[0] if positions else self.config.model.max_positions or seq_length,
        )

    def _counts(self, name: str) -> bool:
        if name.startswith("optimizer.") or any(part in name for part in LEFT_OUT):
            return False
        return self.adapters_active or not name.endswith(ADAPTERS)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | FastTokenizer | None:
        """The one that the data were prepared with, or the given one, which must give the same ids."""
        if self.tokenizer_folder is None:
            return None
        tokenizer = load_tokenizer(self.tokenizer_folder)
        own = own_tokenizer(self.run, Path(self.config.data.data))
        if own != self.tokenizer_folder:
            check_given(tokenizer, self.tokenizer_folder, own)
        return tokenizer

    def _vocabulary(self) -> int:
        if self.config.model.vocab_size:
            return self.config.model.vocab_size
        # The data's own, where it is still there: a --tokenizer that was given may be another one.
        folders = (Path(self.config.data.data), self.run.parent / "data", self.tokenizer_folder)
        manifests = [folder / "manifest.json" for folder in folders if folder is not None]
        manifest = next((path for path in manifests if path.is_file()), None)
        if manifest is not None:
            return read_json(manifest, "give --tokenizer")["vocab_size"]
        if self.tokenizer is not None:
            return self.tokenizer.vocab_size
        raise ValueError(
            f"the vocabulary of {self.run} is that of its data, and {self.config.data.data} is gone: give --tokenizer"
        )

    # -- tensors ------------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor; without the padding of the vocabulary."""
        stored = tuple(self.entries[name].size)
        return (min(stored[0], self.vocabulary), *stored[1:]) if name in VOCABULARY_ROWS else stored

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].properties.dtype

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read([name])[name]

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Some tensors at once.

        Raises:
            ValueError: they are not what was written.
        """
        from slope_megatron.storage.tensors import read_tensors

        read, entries = {name: arguments(name, self.masks) for name in names}, {**self.entries, **self.masks}
        state = {
            one: torch.empty(entries[one].size, dtype=entries[one].properties.dtype)
            for one in itertools.chain(*read.values())
        }
        read_tensors(state, self.reader)
        whole = {name: as_multiplied(*(state[one] for one in read[name])) for name in names}
        return {
            name: tensor[: self.vocabulary] if name in VOCABULARY_ROWS else tensor for name, tensor in whole.items()
        }

    # -- dense --------------------------------------------------------------------------------------------------------

    def is_packed(self, name: str) -> bool:
        return f"{name}_pattern" in self.entries

    def has_adapter(self, name: str) -> bool:
        """Whether the linear with this weight has adapters that take part."""
        return f"{name.removesuffix('.weight')}.adapter_l" in self.entries

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
