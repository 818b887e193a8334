"""What export writes: a folder that appears by one rename when all of it is on disk, and safetensors in shards."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from slope_megatron.storage import folders, sums, whole

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# Configuration, tokenizer, headers of the files.
SMALL_FILES = 64 * 2**20


def parse_size(text: str) -> int:
    """`5GB` -> bytes.

    Raises:
        ValueError: no such size.
    """
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if not match or int(match[1]) < 1:
        raise ValueError(f"--max-shard-size is {text!r}: it must be a number with KB, MB or GB, such as 5GB")
    return int(match[1]) * UNITS[match[2]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(entries: Iterable[Entry], max_bytes: int, stem: str = "model") -> dict[str, list[Entry]]:
    """`{file name: its tensors}` in order; a file is closed before it would pass `max_bytes`."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.bytes
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors": part for i, part in enumerate(files)}


def total_bytes(plan: dict[str, list[Entry]]) -> int:
    return sum(entry.bytes for part in plan.values() for entry in part)


def describe(headline: str, plan: dict[str, list[Entry]], others: list[str]) -> str:
    """For people: what is written and its size, a line a file; `others` as they are."""
    lines = [f"{headline}, {total_bytes(plan) / 1e6:,.1f} MB"]
    for name, entries in plan.items():
        lines.append(f"{name}  {len(entries)} tensors, {sum(entry.bytes for entry in entries) / 1e6:,.1f} MB")
    return "\n  ".join([*lines, *others])


def write_files(folder: Path, plan: dict[str, list[Entry]], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """The planned files, from tensors in the plan's order; one file's tensors are in memory at a time."""
    from safetensors.torch import save_file

    with tqdm(total=total_bytes(plan), desc=folder.name.removesuffix(".partial"), unit="B", unit_scale=True) as bar:
        for name, entries in plan.items():
            content = {}
            for entry in entries:
                found, tensor = next(tensors)
                assert (found, tuple(tensor.shape)) == (entry.name, entry.shape), (found, tensor.shape, entry)
                content[found] = tensor.detach().to(entry.dtype).contiguous()
                bar.update(entry.bytes)
            save_file(content, folder / name, metadata={"format": "pt"})
            # The library makes its files readable for their owner alone.
            (folder / name).chmod(0o644)
    if len(plan) > 1:
        weight_map = {entry.name: name for name, entries in plan.items() for entry in entries}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total_bytes(plan)}, "weight_map": weight_map},
        )


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def check_target(target: Path, size: int) -> None:
    """
    Raises:
        ValueError: something is in the folder, its path leads nowhere, or the disk has no room for `size` bytes.
    """
    if not folders.is_free(folders.output_folder(target, "OUT")):
        raise ValueError(f"{target} exists already: nothing is replaced; give another folder, or remove it")
    parent = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if size + SMALL_FILES > free:
        raise ValueError(
            f"{target} needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: free some, or give a "
            "folder on another disk"
        )


@contextlib.contextmanager
def new_folder(target: Path, size: int, seal: str = "config.json") -> Iterator[Path]:
    """A folder to write `size` bytes into, which gets checksums and its name when the block ends; nothing is left if it
    fails.

    Args:
        seal: the file without which no reader takes the folder for complete.
    """
    check_target(target, size)
    target = folders.output_folder(target, "OUT")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if not sums.manifest_of(partial):
            sums.write_manifest(partial)
        for path in sorted(partial.rglob("*")):
            whole.sync(path)
        whole.sync(partial)
        folders.put(partial, target, seal)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    whole.sync(target.parent)
