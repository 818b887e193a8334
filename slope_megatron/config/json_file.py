"""JSON files, and what to say of one that is damaged."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from slope_megatron.config.text_file import decode


def read_json(path: Path, way_out: str, holds: Collection[str] = ()) -> Any:
    """What a JSON file holds.

    Args:
        way_out: what to do about a file that is damaged.
        holds: keys that it must have.
    Raises:
        ValueError: it is not readable, not UTF-8, no JSON, or lacks a key; names the file.
        FileNotFoundError: it does not exist.
    """
    try:
        content = json.loads(decode(path.read_bytes()))
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): make it readable") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are the former
        raise ValueError(f"{path} is damaged: it is no JSON ({error}); {way_out}") from None
    missing = [key for key in holds if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}; {way_out}")
    return content
