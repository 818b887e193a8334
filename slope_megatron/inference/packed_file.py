"""The packed form on disk: a folder that `slope export packed` writes, and what reads it.

    config.json          {"format": 1, "model": architecture, "config_active" (as in `config.saved`), "nm", "dtype",
                          "step", "sparse_linears_bytes": {...}}
    model*.safetensors   tensors by canonical name; of a packed linear
        X.weight           [N, C]      kept values, from left to right in each row
        X.weight_pattern   [N, K/8]    bitmask uint8: which weights are kept
        X.adapter_l, _r    [R, K], [N, R]   adapters, where they were active: Y += (1/R) (X L) R
    tokenizer.model and others    as the run's data had them
    checksums.json       size and checksum of each of them

The names and the fused Q, K, V (group after group) are those of the checkpoints, so that nothing is reordered.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from slope_megatron.config import ModelConfig
from slope_megatron.config.json_file import read_json
from slope_megatron.config.saved import WEIGHTS, SavedConfig
from slope_megatron.inference.weight_files import FETCH, INDEX, weight_files
from slope_megatron.storage import sums

FORMAT = 1
AGAIN = "copy it again, or export the run again"
PATTERN = "_pattern"


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """`{name: tensor}` of a folder's `weight_files`; each tensor is read when it is asked for.

    Raises:
        ValueError: what `weight_files` raises, or a file is damaged or lacks a tensor.
    """

    def __init__(self, folder: Path | str):
        self.files: dict[str, Path] = {}
        for path, wanted in weight_files(Path(folder)).items():
            try:
                with safe_open(path, framework="pt") as opened:
                    found = set(opened.keys())
            except Exception as error:  # the library's own exception type, or a plain OSError
                raise ValueError(f"{path} is no complete safetensors file ({error}): copy it again") from None
            if wanted is not None and wanted - found:
                raise ValueError(f"{path} lacks {min(wanted - found)}, which {INDEX} says it has: {FETCH}")
            self.files.update(dict.fromkeys(sorted(wanted or found), path))

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        with safe_open(self.files[name], framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())


def check_written(folder: Path, names: Callable[[str], bool] = sums.every) -> None:
    """Compare an exported folder with its manifest; one without is of an older version, and a line in the log says so.

    Raises:
        ValueError: a file is not what was written.
    """
    if sums.manifest_of(folder):
        sums.check_folder(folder, AGAIN, names)
    else:
        sums.note_absence(folder)


def is_packed_folder(folder: Path | str) -> bool:
    """Whether `slope export packed` wrote it."""
    config = Path(folder) / "config.json"
    return config.is_file() and read_json(config, AGAIN).get("model_type") == "slope-packed"


def read_config(folder: Path | str) -> tuple[ModelConfig, dict]:
    """Architecture, and all of config.json.

    Raises:
        ValueError: not such a folder, damaged, of another format, or with settings that this version does not have.
    """
    folder = Path(folder)
    if not is_packed_folder(folder):
        raise ValueError(f"{folder} holds no packed model: give a folder that `slope export packed` wrote")
    # A tokenizer may be gone: --tokenizer gives another.
    check_written(folder, lambda name: name.endswith(".safetensors") or (folder / name).exists())
    content = read_json(folder / "config.json", AGAIN)
    if content["format"] != FORMAT:
        raise ValueError(
            f"{folder} is of format {content['format']} and this version reads {FORMAT}: export the run again"
        )
    described = {**content, "config": {"model": content["model"]}}
    saved = SavedConfig.read(described, ("model",)).check(folder, WEIGHTS)
    return ModelConfig(**saved.values["model"]), content
