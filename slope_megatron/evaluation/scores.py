"""Score files: RUN/scores/NAME.json, which `slope report` puts beside each other."""

import json
from pathlib import Path


def write_scores(folder: Path, name: str, model: Path, settings: dict, scores: dict) -> Path:
    """Write one file; returns its path. A score of the same name is replaced."""
    target = folder / "scores" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(
        json.dumps({"name": name, "model": str(model), "settings": settings, "scores": scores}, indent=1)
    )
    partial.replace(target)
    return target


def read_scores(folder: Path) -> dict[str, dict]:
    """`{name: {metric: value}}` of a run; nested tasks become `task/metric`. A damaged file is passed over."""
    found = {}
    for path in sorted((folder / "scores").glob("*.json")):
        try:
            content = json.loads(path.read_text())
            found[content["name"]] = flat(content["scores"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def flat(scores: dict, prefix: str = "") -> dict[str, float]:
    result: dict[str, float] = {}
    for key, value in scores.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float):
            result[prefix + key] = float(value)
    return result
