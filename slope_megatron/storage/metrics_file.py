"""metrics.jsonl: a JSON object with `step` in each line. One that cannot be read costs nothing but itself."""

import json
from pathlib import Path


def read_metrics(path: Path) -> tuple[list[dict], list[bytes]]:
    """The records of the file, and its lines that are none.

    A last line that a crash cut short is in neither. NULs around a line, which a power cut leaves, are no damage.

    Raises:
        OSError: the file cannot be read.
    """
    records, damaged = [], []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(line.strip(b"\0").decode("utf-8"))
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            damaged.append(line)
    return records, damaged
