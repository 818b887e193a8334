"""Checksums of the files that this program writes: taken at writing, kept in a folder's manifest, compared at reading.

    {name: {"bytes": size, "xxh3_128": sum, "parts": {offset: sum}}}

It is manifest.json in a run's checkpoints and checksums.json elsewhere: prepared data has a manifest of another kind.
`parts`, where a file holds many tensors, has the sum of the bytes from each offset to the next: a reader of few tensors
checks what it reads. XXH3 finds damage as well as SHA-256 does, at ten times the speed (12 against 1 GB/s of one core);
neither keeps out somebody who changes the manifest as well. Manifests written before it have "sha256" instead.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

logger = logging.getLogger(__name__)
CHECKPOINT, FOLDER = "manifest.json", "checksums.json"
ALGORITHM = "xxh3_128"
PIECE = 1 << 22
HASHES: dict[str, Callable[..., Any]] = {ALGORITHM: xxhash.xxh3_128, "sha256": hashlib.sha256}
COPY_AGAIN = "copy it again"


class Damaged(ValueError):
    """A file is not what was written."""


def sum_of(content: bytes) -> str:
    """Hexadecimal sum of bytes in memory."""
    return xxhash.xxh3_128_hexdigest(content)


def file_sums(path: Path, *algorithms: str) -> list[str]:
    """Hexadecimal sums of a file, which is read once, in pieces."""
    hashes = [HASHES[name]() for name in algorithms]
    buffer = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            for each in hashes:
                each.update(buffer[:size])
    return [each.hexdigest() for each in hashes]


def matches(content: bytes, entry: Mapping[str, Any]) -> bool:
    """Whether bytes in memory are those that the entry was made of."""
    algorithm = algorithm_of(entry)
    return len(content) == entry["bytes"] and HASHES[algorithm](content).hexdigest() == entry[algorithm]


def seal(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"bytes": path.stat().st_size, ALGORITHM: file_sums(path, ALGORITHM)[0]}


def difference(path: Path, entry: Mapping[str, Any], *, contents: bool = True) -> str | None:
    """How a file, or without `contents` its size, differs from its entry, in words that follow its name; or None."""
    try:
        if not path.exists():
            return "is missing"
        if not path.is_file():
            return "is no file"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes instead of {entry['bytes']}"
        algorithm = algorithm_of(entry)
        if contents and file_sums(path, algorithm)[0] != entry[algorithm]:
            return "has another checksum"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def algorithm_of(entry: Mapping[str, Any]) -> str:
    """The fastest that the entry has a sum of."""
    return next(name for name in HASHES if name in entry)


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own sum, for files that no manifest lists."""
    return {**content, ALGORITHM: _own_sum(content)}


def is_signed_right(content: Mapping[str, Any]) -> bool | None:
    """Whether a JSON object is what was signed; None: it carries no sum."""
    return content[ALGORITHM] == _own_sum(content) if ALGORITHM in content else None


def _own_sum(content: Mapping[str, Any]) -> str:
    """Of what JSON makes of it, which is what a reader has: keys that are no strings become some, and sort as such."""
    rest = {key: value for key, value in content.items() if key != ALGORITHM}
    return sum_of(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode())


def manifest_of(folder: Path) -> Path | None:
    """The file with a folder's sums; None: it has none.

    Raises:
        OSError: the folder cannot be looked into.
    """
    return next((folder / name for name in (CHECKPOINT, FOLDER) if (folder / name).exists()), None)


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """The entries of a folder's manifest; None: it has none.

    Raises:
        Damaged: there is one that cannot be read.
    """
    path = None
    try:
        path = manifest_of(folder)
        if path is None:
            return None
        entries = json.loads(path.read_text())
        for entry in entries.values():
            int(entry["bytes"]), algorithm_of(entry), dict(entry.get("parts", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise Damaged(f"{path.name if path else CHECKPOINT} cannot be read{reason}") from None
    return entries


@functools.cache
def note_absence(folder: Path) -> None:
    """Say once of a folder that nothing in it can be checked."""
    logger.info("%s carries no checksums: damage in it would go unnoticed", folder)


def every(name: str) -> bool:
    return True


def find_damage(
    folder: Path, contents: Callable[[str], bool] = every, names: Callable[[str], bool] = every
) -> str | None:
    """The first file that is not what was written, and how it differs.

    Args:
        contents: whether a file's bytes are compared with its sum, and not its size alone.
        names: whether a file is looked at.
    """
    try:
        entries = read_manifest(folder)
    except Damaged as error:
        return str(error)
    if entries is None:
        return f"{CHECKPOINT} is missing"
    for name, entry in entries.items():
        found = difference(folder / name, entry, contents=contents(name)) if names(name) else None
        if found:
            return f"{name} {found}"
    return None


def damaged(folder: Path, damage: str, way_out: str) -> Damaged:
    """The error for a folder with damage, as `find_damage` words it; one sentence, whoever finds it."""
    return Damaged(f"{folder} is corrupt: its file {damage}; {way_out}")


def check_folder(
    folder: Path, way_out: str, names: Callable[[str], bool] = every, contents: Callable[[str], bool] = every
) -> None:
    """Raise `Damaged`, in one sentence, for a folder with a file that is not what was written."""
    if damage := find_damage(folder, contents, names):
        raise damaged(folder, damage, way_out)


def check_before_reading(folder: Path, way_out: str) -> None:
    """`check_folder` without the contents of what its readers check themselves, tensor by tensor."""
    try:
        entries = read_manifest(folder) or {}
    except Damaged as error:
        raise damaged(folder, str(error), way_out) from None
    check_folder(folder, way_out, contents=lambda name: not entries[name].get("parts"))


def write_manifest(folder: Path, known: Mapping[str, dict] | None = None) -> None:
    """Seal every file of a finished folder; `known` has the entries that were made while their files were written."""
    known = known or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    entries = {name: known[name] if name in known else seal(folder / name) for name in names if name != FOLDER}
    (folder / FOLDER).write_text(json.dumps(entries, indent=1) + "\n")
