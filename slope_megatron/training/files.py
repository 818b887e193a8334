"""Files of a run: written whole (`storage.whole`), and what went wrong with one in words."""

import os
from pathlib import Path

from slope_megatron.storage.whole import write_json, write_text

__all__ = ["reason", "sync_folder", "write_json", "write_text"]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """Why writing failed, in words: the system's own error if one is behind it (torch wraps it when a disk is full)."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}{f': {cause.filename}' if cause.filename else ''}"
    return " ".join(str(error).split())[:300] or type(error).__name__
