"""manifest.json: what a prepared folder holds, and whether it still does."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from slope_megatron.storage import sums

NAME = "manifest.json"
# The folder for Megatron's index files, which a run adds later.
CACHE = "cache"
FORMAT = 2


def dataset_name(split: str, source: int, sources: int) -> str:
    """The name, without .bin and .idx, of one source's part of a split."""
    return split if sources == 1 else f"{split}_{source}"


def describe_files(folder: Path) -> dict[str, dict]:
    """`{name: {bytes, sha256, xxh3_128}}` of every file in `folder`, but for the manifest.

    SHA-256 says which data it is, XXH3 quickly whether it still is.
    """
    names = ("sha256", sums.ALGORITHM)
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    return {
        path.name: {"bytes": path.stat().st_size, **dict(zip(names, sums.file_sums(path, *names), strict=True))}
        for path in paths
    }


def write_manifest(folder: Path, manifest: dict) -> None:
    text = json.dumps(sums.signed({"format": FORMAT, **manifest}), indent=2, ensure_ascii=True)
    (folder / NAME).write_text(text + "\n")


def foreign_entries(folder: Path) -> list[str]:
    """What is in `folder` that no prepare wrote; all of it, if the manifest is not ours."""
    entries = {path.name for path in folder.iterdir()}
    try:
        manifest = json.loads((folder / NAME).read_text())
        ours = {NAME, CACHE, *manifest["files"]} if "corpus" in manifest and "splits" in manifest else set()
    except (OSError, ValueError, TypeError, KeyError):
        ours = set()
    return sorted(entries - ours)


def load_manifest(folder: str | Path) -> dict:
    """The manifest of a prepared folder, whose files are there and of their size.

    Raises:
        ValueError: no such folder, not a prepared one, another format, or a file that is missing or cut.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"data folder {folder} is a file: give a folder that `slope data prepare` wrote")
    if not folder.is_dir():
        raise ValueError(
            f"data folder {folder} does not exist: write it with `slope data prepare SOURCE --out {folder}`"
        )
    if not (folder / NAME).is_file():
        raise ValueError(f"{folder} holds no {NAME}: give a folder that `slope data prepare` wrote")
    try:
        manifest = json.loads((folder / NAME).read_text())
        found, files = manifest["format"], manifest["files"]
    except PermissionError as error:
        raise ValueError(f"{folder / NAME} cannot be read ({error.strerror}): make it readable") from None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{folder / NAME} is damaged: delete {folder} and prepare the data again") from None
    if found != FORMAT:
        raise ValueError(
            f"{folder / NAME} is of format {found}, this version reads {FORMAT}: "
            "prepare the data again, with --overwrite"
        )
    if sums.is_signed_right(manifest) is False:
        raise ValueError(
            f"{folder / NAME} is not what was written (it has another checksum): copy it again, or prepare the data "
            "again, with --overwrite"
        )
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes, not {expected['bytes']}"
            raise ValueError(f"{path} {state}: copy it again, or prepare the data again, with --overwrite")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be read (Permission denied): make it readable")
    return manifest


def verify(folder: str | Path, names: Callable[[str], bool] = sums.every) -> dict:
    """`load_manifest`, with every byte of the files that `names` says yes to compared; a ValueError for another one."""
    manifest = load_manifest(folder)
    for name, expected in manifest["files"].items():
        if names(name) and (found := sums.difference(Path(folder) / name, expected)):
            raise ValueError(
                f"{Path(folder) / name} is not the file that was written (it {found}): copy it again, or prepare the "
                "data again, with --overwrite"
            )
    return manifest


def fingerprint(folder: str | Path) -> str:
    """The manifest's sha256: it stands for the content of the whole folder."""
    return sums.file_sums(Path(folder) / NAME, "sha256")[0]
