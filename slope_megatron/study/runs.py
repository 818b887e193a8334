"""The runs that a study is made of: each a settings file of `slope pretrain`, known by its name and by its settings."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slope_megatron.config import Config
from slope_megatron.config.yaml_file import write_yaml
from slope_megatron.study import controls
from slope_megatron.study.rows import Rows
from slope_megatron.study.settings import SECTION_CLASSES, BestOf, Group, Narrow, Study
from slope_megatron.training.telemetry.flops import flops_per_token

# Settings that say where a run reads and writes, and nothing of what it computes.
PLACES = {"data": ("data", "cache"), "train": ("out",)}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: `GROUP/SIZE-METHOD-lrX-seedN`; unique in a study.
        settings: sections of the settings file, without the places of data and run folder.
        lr: None: rows that tell it are missing; `settings` then holds the middle one of the sweep.
        body_parameters: of the size's dense model, without embeddings.
    """

    name: str
    group: str
    size: str
    method: str
    seed: int
    lr: float | None
    settings: dict[str, dict]
    config: Config
    vocabulary: int
    body_parameters: int

    @property
    def key(self) -> str:
        """Equal for runs of equal settings, in whatever group: one of them trains, and both have its row."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def tokens(self) -> int:
        return self.config.train.steps * self.config.data.global_batch_size * self.config.data.seq_length

    @property
    def flops(self) -> float:
        """Of the whole run, as a dense model of this shape."""
        return self.tokens * flops_per_token(self.config, self.vocabulary).dense_equivalent

    def folder(self, out: Path) -> Path:
        return out / "runs" / f"{self.name}.{self.key}"

    def write_settings(self, path: Path, data: Path, folder: Path) -> None:
        """The file that `slope pretrain --config` takes."""
        content = {section: dict(values) for section, values in self.settings.items()}
        content.setdefault("data", {})["data"] = str(data)
        content.setdefault("train", {})["out"] = str(folder)
        write_yaml(path, content)


def plan(study: Study, rows: Rows, vocabulary: int) -> Iterator[Run]:
    """All runs in the order of the file; those with a learning rate of None wait for rows.

    Raises:
        ValueError: a run's settings contradict each other; names the run.
    """
    for name, group in study.groups.items():
        for size in group.sizes:
            for method in group.methods:
                for label, lr in learning_rates(study, rows, vocabulary, group, size, method):
                    for seed in group.seeds:
                        title = f"{name}/{size}-{method}-lr{label}-seed{seed}"
                        yield make(study, vocabulary, title, name, size, method, lr, seed)


def make(
    study: Study, vocabulary: int, title: str, group: str, size: str, method: str, lr: float | None, seed: int
) -> Run:
    """One run of a study."""
    entry = study.groups[group]
    rate = provisional(study, entry) if lr is None else lr
    try:
        body = parameters_of(study, size, vocabulary)
        settings = merged(study.base, {"model": study.sizes[size]}, study.methods[method].sections)
        settings = merged(settings, {"optimizer": {"lr": rate}, "train": {"seed": seed}})
        config = config_of(settings)
        batch = config.data.global_batch_size * config.data.seq_length
        steps = max(1, round(entry.tokens_per_parameter * body / batch))
        settings = merged(settings, {"train": {"steps": steps}})
        narrow = study.methods[method].narrow
        if narrow:
            own = narrow_model(study, vocabulary, size, narrow, config_of(settings))
            settings = merged(settings, {"model": own})
        return Run(title, group, size, method, seed, lr, settings, config_of(settings), vocabulary, body)
    except ValueError as error:
        raise ValueError(f"run {title}: {error}") from None


def merged(*parts: dict[str, dict]) -> dict[str, dict]:
    """Sections over each other; later ones win, key by key."""
    found: dict[str, dict] = {}
    for part in parts:
        for section, values in part.items():
            found[section] = {**found.get(section, {}), **values}
    return found


def config_of(settings: dict[str, dict]) -> Config:
    """As `slope pretrain` reads the settings file."""
    parts: dict[str, Any] = {section: SECTION_CLASSES[section](**values) for section, values in settings.items()}
    return Config(**parts)


def parameters_of(study: Study, size: str, vocabulary: int) -> int:
    """Parameters of a size's dense model, without its embeddings: what tokens and learning rates go by."""
    dense = merged(study.base, {"model": study.sizes[size], "slope": {"enabled": False}})
    return controls.body_parameters(config_of(dense), vocabulary)


def narrow_model(study: Study, vocabulary: int, size: str, narrow: Narrow, dense: Config) -> dict[str, int]:
    """The widths of a control, as keys of section `model`."""
    if narrow.to == "flops":
        speedup = study.speedups[narrow.speedup][study.charged_as(narrow.of)]
        target = controls.step_flops(dense, vocabulary) / speedup
    else:
        other = merged(study.base, {"model": study.sizes[size]}, study.methods[narrow.of].sections)
        other = merged(other, {"train": {"steps": dense.train.steps}})
        target = controls.COSTS[narrow.to](config_of(other), vocabulary)
    model = controls.narrowed(dense, vocabulary, narrow.to, target)
    return {"hidden_size": model.hidden_size, "ffn_hidden_size": model.ffn}


def provisional(study: Study, group: Group) -> float:
    """A rate for runs whose own is not known yet, so that they can be checked and counted."""
    source = study.groups[group.lr.best_of].lr if isinstance(group.lr, BestOf) else group.lr
    assert isinstance(source, tuple)
    return sorted(source)[len(source) // 2]


def learning_rates(
    study: Study, rows: Rows, vocabulary: int, group: Group, size: str, method: str
) -> Iterator[tuple[str, float | None]]:
    """(its part of the run's name, the rate) of each run of a cell."""
    if not isinstance(group.lr, BestOf):
        yield from ((f"{lr:g}", lr) for lr in group.lr)
        return
    best = best_lr(study, rows, vocabulary, group.lr.best_of, study.tuned_as(method))
    for factor in group.lr.times:
        label = "best" if factor == 1.0 else f"best*{factor:g}"
        if best is None:
            yield label, None
            continue
        swept = study.groups[group.lr.best_of].sizes[0]
        larger = parameters_of(study, size, vocabulary) / parameters_of(study, swept, vocabulary)
        # Three digits, so that a rate is the same number wherever it is computed.
        yield label, float(f"{best * factor * larger**group.lr.exponent:.3g}")


def best_lr(study: Study, rows: Rows, vocabulary: int, sweep: str, method: str) -> float | None:
    """The learning rate of the lowest loss, averaged over the sweep's seeds; None: not all rows of it are there.

    Raises:
        ValueError: all of them diverged.
    """
    group = study.groups[sweep]
    size = group.sizes[0]
    losses: dict[float, list[float]] = {}
    for label, lr in learning_rates(study, rows, vocabulary, group, size, method):
        assert lr is not None, "a sweep has a list of rates"
        for seed in group.seeds:
            title = f"{sweep}/{size}-{method}-lr{label}-seed{seed}"
            row = rows.find(make(study, vocabulary, title, sweep, size, method, lr, seed).key)
            if row is None:
                return None
            losses.setdefault(lr, []).append(float("inf") if row.val_loss is None else row.val_loss)
    mean = {lr: sum(own) / len(own) for lr, own in losses.items()}
    best = min(mean, key=mean.__getitem__)
    if mean[best] == float("inf"):
        raise ValueError(f"group {sweep} has no loss for {method}: all its runs diverged; add lower learning rates")
    return best
