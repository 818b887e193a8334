"""Writing a file so that a reader sees the old content or the new, never half of it; and why it failed, in words."""

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step: a sibling is written, flushed to disk and renamed. A link is followed."""
    path = Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, so that a rename in it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
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
