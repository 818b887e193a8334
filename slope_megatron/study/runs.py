"""The runs that a study is made of: each a settings file of `slope pretrain`, known by its name and by its settings."""

import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: `GROUP/SIZE-METHOD-lrX-seedN`; unique in a study.
        settings: sections of the settings file, without the places of data and run folder.
        lr: None: rows that tell it are missing; `settings` then holds the middle one of the sweep.
        data: the tokens and tokenizer (`fingerprint_of`); empty: not prepared yet.
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
    data: str
    body_parameters: int

    @functools.cached_property
    def key(self) -> str:
        """Equal for runs of equal settings and data, in whatever group: one of them trains, and both have its row."""
        return short_hash(json.dumps(self.settings, sort_keys=True) + self.data)

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


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint_of(manifest: dict) -> str:
    """Of prepared data: equal for equal tokens, splits and tokenizer, wherever the text came from."""
    return short_hash(json.dumps({name: file["sha256"] for name, file in manifest["files"].items()}, sort_keys=True))


def millions(tokens: int) -> str:
    """With as many digits as are of interest."""
    return f"{tokens / 1e6:,.1f}" if tokens >= 1e7 else f"{tokens / 1e6:.3g}"


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


class Plan:
    """The runs of a study, as the rows so far tell their learning rates.

    Args:
        vocabulary: entries of the tokenizer.
        data: as in `Run`.
    """

    def __init__(self, study: Study, rows: Rows, vocabulary: int, data: str = ""):
        self.study, self.rows, self.vocabulary, self.data = study, rows, vocabulary, data
        self.parameters = {size: self.parameters_of(size) for size in study.sizes}
        self.made: dict[tuple[str, float | None], Run] = {}

    def runs(self) -> list[Run]:
        """All of them, in the order of the file; those with a learning rate of None wait for rows.

        Raises:
            ValueError: a run's settings contradict each other; names the run.
        """
        return [
            self.run(name, size, method, label, lr, seed)
            for name, group in self.study.groups.items()
            for size in group.sizes
            for method in group.methods
            for label, lr in self.learning_rates(group, size, method)
            for seed in group.seeds
        ]

    def run(self, group: str, size: str, method: str, label: str, lr: float | None, seed: int) -> Run:
        """One run, made when it is first asked for; `label` is its learning rate in its name."""
        title = f"{group}/{size}-{method}-lr{label}-seed{seed}"
        if (title, lr) not in self.made:
            try:
                settings = self.settings_of(self.study.groups[group], size, method, lr, seed)
                config = config_of(settings)
            except ValueError as error:
                raise ValueError(f"run {title}: {error}") from None
            about = (title, group, size, method, seed, lr)
            text = (self.vocabulary, self.data)
            self.made[title, lr] = Run(*about, settings, config, *text, self.parameters[size])
        return self.made[title, lr]

    def settings_of(self, group: Group, size: str, method: str, lr: float | None, seed: int) -> dict[str, dict]:
        """Sections of the settings file."""
        rate = self.provisional(group, method) if lr is None else lr
        settings = self.of_method(size, method)
        settings = merged(settings, {"optimizer": {"lr": rate}, "train": {"seed": seed}})
        data = config_of(settings).data
        steps = round(group.tokens_per_parameter * self.parameters[size] / (data.global_batch_size * data.seq_length))
        settings = merged(settings, {"train": {"steps": max(1, steps)}})
        narrow = self.study.methods[method].narrow
        return merged(settings, {"model": self.narrow_model(size, narrow, config_of(settings))}) if narrow else settings

    def of_method(self, size: str, method: str) -> dict[str, dict]:
        return merged(self.study.base, {"model": self.study.sizes[size]}, self.study.methods[method].sections)

    def parameters_of(self, size: str) -> int:
        """Of a size's dense model, without its embeddings: what tokens and learning rates go by."""
        dense = merged(self.study.base, {"model": self.study.sizes[size], "slope": {"enabled": False}})
        try:
            return controls.body_parameters(config_of(dense), self.vocabulary)
        except ValueError as error:
            raise ValueError(f"size {size}: {error}") from None

    def narrow_model(self, size: str, narrow: Narrow, dense: Config) -> dict[str, int]:
        """The widths of a control, as keys of section `model`."""
        other = config_of(merged(self.of_method(size, narrow.of), {"train": {"steps": dense.train.steps}}))
        if narrow.to == "flops":
            gain = self.study.speedups[narrow.speedup][self.study.timed_as(narrow.of)]
            target = controls.step_flops(dense, self.vocabulary) / controls.speedup_of_run(other, gain)
        else:
            target = controls.COSTS[narrow.to](other, self.vocabulary)
        model = controls.narrowed(dense, self.vocabulary, narrow.to, target)
        return {"hidden_size": model.hidden_size, "ffn_hidden_size": model.ffn}

    def provisional(self, group: Group, method: str) -> float:
        """A rate for runs whose own is not known yet, so that they can be checked and counted."""
        source = self.study.groups[group.lr.best_of] if isinstance(group.lr, BestOf) else group
        rates = source.rates(self.study.tuned_as(method))
        return rates[len(rates) // 2]

    def learning_rates(self, group: Group, size: str, method: str) -> Iterator[tuple[str, float | None]]:
        """(its part of the run's name, the rate) of each run of a cell."""
        if not isinstance(group.lr, BestOf):
            yield from ((f"{lr:g}", lr) for lr in group.rates(method))
            return
        best = self.best_lr(group.lr.best_of, self.study.tuned_as(method))
        swept = self.study.groups[group.lr.best_of].sizes[0]
        carried = (self.parameters[size] / self.parameters[swept]) ** group.lr.exponent
        for factor in group.lr.times:
            label = "best" if factor == 1.0 else f"bestx{factor:g}"
            # Three digits, so that a rate is the same number wherever it is computed.
            yield label, None if best is None else float(f"{best * factor * carried:.3g}")

    def best_lr(self, sweep: str, method: str) -> float | None:
        """The rate of the lowest loss, averaged over the sweep's seeds; None: rows are missing, or all diverged."""
        group = self.study.groups[sweep]
        mean = {}
        for label, lr in self.learning_rates(group, group.sizes[0], method):
            runs = [self.run(sweep, group.sizes[0], method, label, lr, seed) for seed in group.seeds]
            rows = [self.rows.find(run.key) for run in runs]
            losses = [float("inf") if row.val_loss is None else row.val_loss for row in rows if row is not None]
            if len(losses) < len(rows):
                return None
            mean[lr] = sum(losses) / len(losses)
        best = min(mean, key=mean.__getitem__)
        return best if mean[best] < float("inf") else None
