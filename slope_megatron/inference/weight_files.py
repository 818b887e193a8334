"""Which files of a folder hold its weights: the index says so where there is one.

Folders on the hub have more than their weights: the maker's own form (consolidated.safetensors), pickled copies
(pytorch_model.bin), variants of other types (model.fp16.safetensors), adapters, an `original` folder.
"""

import re
from pathlib import Path

from slope_megatron.config.json_file import read_json

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
# Never the weights themselves in the names of transformers.
BESIDE = ("adapter_", "consolidated")
FETCH = "fetch the folder again"
POINTER = b"version https://git-lfs"


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The .safetensors files of a folder's weights, and which tensors each gives: None for all that it has.

    Raises:
        ValueError: there is none, it is not clear which, or one that the index or the shards' names tell is missing.
    """
    indexed = (folder / INDEX).is_file()
    files = _of_index(folder) if indexed else dict.fromkeys(_without_index(folder))
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing, one of {len(files)} files of the weights: {FETCH}")
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ValueError(f"{path} is a pointer of Git LFS and not the file: run `git lfs pull` in {folder}")
    return files


def _of_index(folder: Path) -> dict[Path, set[str] | None]:
    content = read_json(folder / INDEX, FETCH)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map of tensors to files; {FETCH}")
    files: dict[Path, set[str] | None] = {}
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names {name!r}, which is no .safetensors file of its folder: {FETCH}")
        files[folder / name] = {tensor for tensor, file in names.items() if file == name}
    return files


def _without_index(folder: Path) -> list[Path]:
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    found = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(BESIDE)]
    shards = {match[2] for path in found if (match := SHARD.fullmatch(path.name))}
    if len(shards) == 1:
        count = shards.pop()
        return [folder / f"model-{n + 1:0{len(count)}d}-of-{count}.safetensors" for n in range(int(count))]
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise ValueError(
            f"{folder} has several .safetensors files and no {INDEX} that says which are the weights ({names}): "
            f"leave one there, or rename it to {WHOLE}"
        )
    if not found:
        beside = sorted(path.name for path in folder.glob("*.safetensors"))
        have = f" but {beside[0]}, which is in other names or an adapter" if beside else ""
        raise ValueError(f"{folder} holds no .safetensors file{have}: give the folder of a model saved as such")
    return found
