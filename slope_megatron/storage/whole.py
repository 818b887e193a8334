"""Writing a file so that a reader sees the old content or the new, never half of it."""

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
