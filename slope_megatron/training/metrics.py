"""Metrics: one JSON line a logged step, and one moving line for whoever watches."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from slope_megatron.training import files


class Metrics:
    """metrics.jsonl of a run; on resume, lines of steps that will be done again are dropped."""

    def __init__(self, path: Path, steps_done: int):
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= steps_done]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values) -> None:
        """Append one line; `step` counts finished steps."""
        with open(self.path, "a") as stream:
            stream.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """All complete lines; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class Progress:
    """One line on rank 0: step, loss, tokens/s, time left. Where nobody watches a terminal, a line twice a minute."""

    def __init__(self, name: str, steps: int, done: int, visible: bool):
        watched = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            initial=done,
            desc=name,
            unit="step",
            disable=not visible,
            mininterval=0.2 if watched else 30.0,
            maxinterval=1.0 if watched else 30.0,
            dynamic_ncols=watched,
            ascii=not watched,
        )

    def step(self, loss: float, tokens_per_second: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
