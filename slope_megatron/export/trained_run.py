"""`TrainedModel` of a run that `slope pretrain` wrote."""

import dataclasses
import functools
import re
from pathlib import Path

from slope_megatron.config.json_file import read_json
from slope_megatron.config.saved import WEIGHTS, SavedConfig
from slope_megatron.data.fast_tokenizer import FastTokenizer
from slope_megatron.data.tokenizer import Tokenizer, load_tokenizer
from slope_megatron.export.run_tokenizer import check_given, choose_tokenizer, own_tokenizer
from slope_megatron.export.trained_model import OTHER_STEP, TrainedModel
from slope_megatron.storage import latest, sums

STEP = re.compile(r"step_\d{8,}")
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


class TrainedRun(TrainedModel):
    """The newest checkpoint of a run, or that of a step.

    Args:
        run: run folder.
        step: of the checkpoint; None: the newest.
        tokenizer: file or folder that overrides the data's.
    Raises:
        ValueError: what `find_checkpoint` and `SavedConfig.check` raise, a file of the checkpoint is not what was
            written, or the vocabulary's size cannot be known.
    """

    def __init__(self, run: Path | str, step: int | None = None, tokenizer: Path | None = None):
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
        self.open_tensors(self.folder)
        self.tokenizer_folder = choose_tokenizer(self.run, Path(self.config.data.data), tokenizer)
        self.vocabulary = self._vocabulary()
        positions = self.tensors.places.get("embedding.position_embeddings.weight")
        asked = self.config.model.max_positions or self.config.data.seq_length
        self.model = dataclasses.replace(
            self.config.model,
            vocab_size=self.vocabulary,
            max_positions=positions.shape[0] if positions else asked,
        )

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
