"""Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases if asked; one that fails stops no run."""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from slope_megatron.config import Config
from slope_megatron.storage import earlier, whole
from slope_megatron.storage.metrics_file import read_metrics

logger = logging.getLogger(__name__)


def check_installed(config: Config) -> None:
    """Refuse a writer whose package is missing.

    Raises:
        ValueError: names the package and the way out.
    """
    asked = (
        (config.watch.tensorboard, "--tensorboard", "tensorboard"),
        (config.watch.wandb is not None, "--wandb", "wandb"),
    )
    for wanted, flag, package in asked:
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"{flag} needs the package {package}: pip install {package}, or leave {flag} out")


class Writer(Protocol):
    """`values` holds `step` and numbers, truth values, None, or nested dicts."""

    def write(self, values: dict) -> None: ...

    def close(self) -> None: ...


def open_writers(config: Config, run: Path, steps_done: int) -> list[Writer]:
    """This run's writers, for rank 0."""
    opening: list[Callable[[], Writer]] = [lambda: JsonLines(run / "metrics.jsonl", steps_done)]
    if config.watch.tensorboard:
        opening.append(lambda: TensorBoard(run / "tensorboard", steps_done))
    if config.watch.wandb is not None:
        opening.append(lambda: WeightsAndBiases(config, run))
    writers: list[Writer] = []
    for build in opening:
        try:
            writers.append(Forgiving(build()))
        except Exception as error:
            logger.warning("metrics: one writer could not be opened (%s); the run goes on", whole.reason(error))
    return writers


class Forgiving:
    """A writer whose errors are logged once, and again when it has recovered and fails anew."""

    def __init__(self, writer: Writer):
        self.writer = writer
        self.failing = False

    def write(self, values: dict) -> None:
        self.attempt(lambda: self.writer.write(values))

    def close(self) -> None:
        self.attempt(self.writer.close)

    def attempt(self, action) -> None:
        try:
            action()
            self.failing = False
        except Exception as error:
            if not self.failing:
                name = type(self.writer).__name__
                logger.warning("metrics: %s failed (%s); the run goes on", name, whole.reason(error))
            self.failing = True


def strict(value):
    """JSON has no NaN and no infinity: such numbers become null."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(values: dict, prefix: str = "") -> dict[str, float]:
    """Numbers of nested dicts by their path, `layers/decoder.layers.0.mlp.linear_fc1.weight/drift`; no step."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(scalars(value, f"{prefix}{key}/"))
        elif isinstance(value, (bool, int, float)) and key != "step":
            found[f"{prefix}{key}"] = float(value)
    return found


class JsonLines:
    """One JSON line a record; on resume, lines of steps that will be done again are dropped.

    Lines that cannot be read move to `metrics.jsonl.damaged`, a whole file that cannot be read to `earlier`.
    """

    def __init__(self, path: Path, steps_done: int):
        self.path = path
        lines, damaged = self.read()
        if damaged:
            aside = path.with_name(f"{path.name}.damaged")
            with open(aside, "ab") as stream:
                stream.writelines(line + b"\n" for line in damaged)
            logger.warning("%s: %d damaged lines are kept in %s, the others stay", path, len(damaged), aside.name)
        kept = [line for line in lines if line["step"] <= steps_done]
        whole.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.size = path.stat().st_size

    def read(self) -> tuple[list[dict], list[bytes]]:
        """Records and damaged lines; none of a file that cannot be read, which is set aside."""
        try:
            return read_metrics(self.path)
        except FileNotFoundError:
            return [], []
        except OSError as error:
            earlier.set_aside(self.path, f"it cannot be read ({error.strerror})")
            return [], []

    def write(self, values: dict) -> None:
        """Append one line. What an earlier failure left of half a line is cut off first."""
        with open(self.path, "r+b") as stream:
            stream.truncate(self.size)
            stream.seek(self.size)
            stream.write((json.dumps(strict(values)) + "\n").encode())
            stream.flush()
            self.size = stream.tell()

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files; on resume, what TensorBoard shows of steps that will be done again is dropped (`purge_step`)."""

    def __init__(self, folder: Path, steps_done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)

    def write(self, values: dict) -> None:
        for name, value in scalars(values).items():
            self.events.add_scalar(name, value, values["step"])
        self.events.flush()

    def close(self) -> None:
        self.events.close()


class WeightsAndBiases:
    """A run of its own in RUN/wandb, offline unless WANDB_MODE says otherwise. A resumed run is a new one there."""

    def __init__(self, config: Config, run: Path):
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project=config.watch.wandb, name=run.name, dir=str(run), config=config.to_dict(), mode=mode
        )

    def write(self, values: dict) -> None:
        self.run.log(scalars(values), step=values["step"])

    def close(self) -> None:
        self.run.finish()
