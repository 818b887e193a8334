"""Folders that commands write: where they really are, how they get their name, and how they are emptied.

An output folder may be a link to a disk with more room, or a mounted disk. It is followed, and neither replaced nor
removed: half-written folders lie beside the link's target, on its file system.
"""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

logger = logging.getLogger(__name__)
# A rename is refused between file systems, of a folder in a lower layer of a container, and over a mounted disk.
NO_RENAME = {errno.EXDEV, errno.EBUSY}


def output_folder(path: Path | str, flag: str) -> Path:
    """Where an output folder is, or will be, with all links followed.

    Args:
        flag: what the user gave it as, for the message.
    Raises:
        ValueError: a part of the path is a file, a link to nowhere, a link to itself, or closed to this user.
    """
    absolute = Path(path).absolute()
    for part in (*reversed(absolute.parents), absolute):
        problem = obstacle(part)
        if problem:
            where = f"{flag} {path}" if part == absolute else f"{flag} {path}: {part}"
            raise ValueError(f"{where} {problem}")
    return Path(os.path.realpath(absolute))


def obstacle(part: Path) -> str | None:
    """Why nothing can be written below this path, and the way out; None: it is a folder, or not there yet."""
    try:
        part.stat()
    except FileNotFoundError:
        if part.is_symlink():
            return f"is a link to {os.readlink(part)}, which does not exist; make that folder, or give another path"
    except PermissionError:
        return "cannot be entered (Permission denied); make it accessible to you, or give another path"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "is a link that leads back to itself; make it point to a folder, or give another path"
    else:
        if not part.is_dir():
            return "is a file; give the path of a folder"
    return None


def is_free(folder: Path, apart_from: Collection[str] = ()) -> bool:
    """Whether a folder is not there yet, or empty but for some names."""
    return not folder.exists() or all(path.name in apart_from for path in folder.iterdir())


def empty(folder: Path, *, keep: Collection[str] = (), last: str = "", follow: Collection[str] = ()) -> None:
    """Remove what is in a folder, which itself stays: it may be a link's target or a mounted disk.

    Args:
        keep: names that stay.
        last: the name that goes last: what tells whose folder it is, while the rest is being removed.
        follow: names of folders that stay, emptied, where they are links to another disk.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        if path.name in keep:
            continue
        if path.is_symlink() and path.is_dir() and path.name in follow:
            empty(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove(folder: Path) -> None:
    """Remove a folder with what is in it; of a link and of a mounted disk, only what is in it."""
    empty(folder)
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.rmdir()


def put(finished: Path, target: Path, seal: str) -> None:
    """Give a finished folder its name; what was there goes.

    One rename, where the file system lets it. Else the target is filled entry by entry, with a line in the log.

    Args:
        finished: a sibling of `target`, or in a sibling.
        target: its name, links followed; what is there may be lost.
        seal: the file that tells readers that the folder is complete: it comes last.
    """
    old = finished.with_name(f"{finished.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(finished, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        logger.warning("%s cannot be renamed to %s (%s): it is filled file by file", finished, target, error.strerror)
        move_entries(finished, target, seal)
    shutil.rmtree(old, ignore_errors=True)


def move_entries(finished: Path, target: Path, seal: str) -> None:
    """Move the entries of a folder into another one, the seal last; what was there goes first, its seal before all."""
    target.mkdir(exist_ok=True)
    (target / seal).unlink(missing_ok=True)
    empty(target)
    for path in sorted(finished.iterdir(), key=lambda path: path.name == seal):
        partial = target / f"{path.name}.partial"
        shutil.move(path, partial)
        os.rename(partial, target / path.name)
    finished.rmdir()
