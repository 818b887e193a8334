"""Score files: RUN/scores/NAME.json, which `slope report` puts beside each other."""

import json
import logging
from pathlib import Path

from slope_megatron.storage import earlier, whole

logger = logging.getLogger(__name__)


def write_scores(folder: Path, name: str, model: Path, settings: dict, scores: dict) -> Path:
    """Write one file; returns its path. A score of the same name is replaced, one of other settings is kept besides."""
    target = folder / "scores" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"name": name, "model": str(model), "settings": settings, "scores": scores}
    before = read_score(target)
    if before is not None and any(before.get(key) != content[key] for key in ("model", "settings")):
        earlier.set_aside(target, "it was measured on another model or with other settings")
    whole.write_json(target, content)
    return target


def read_score(path: Path) -> dict | None:
    """The content of one file; None, with a line in the log where it is damaged: there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "name": content["name"], "scores": content["scores"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is no score file (%s): passed over", path, error)
        return None


def read_scores(folder: Path) -> dict[str, dict]:
    """`{name: {metric: value}}` of a run; nested tasks become `task/metric`. A damaged file is passed over."""
    found = {}
    for path in sorted((folder / "scores").glob("*.json")):
        content = read_score(path)
        if content is not None and isinstance(content["scores"], dict):
            found[content["name"]] = flat(content["scores"])
    return found


def flat(scores: dict, prefix: str = "") -> dict[str, float]:
    result: dict[str, float] = {}
    for key, value in scores.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float):
            result[prefix + key] = float(value)
    return result
