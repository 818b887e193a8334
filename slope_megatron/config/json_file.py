"""JSON files, and what to say of one that is damaged."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, way_out: str) -> Any:
    """What a JSON file holds.

    Args:
        way_out: what to do about a file that is damaged.
    Raises:
        ValueError: it is not readable, not UTF-8, or no JSON; names the file.
        FileNotFoundError: it does not exist.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): make it readable") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
        raise ValueError(f"{path} is damaged: it is no JSON ({error}); {way_out}") from None
