"""A configuration that was saved, maybe by another version: what settings mean that the file or this version lacks.

    state.json, run.json   {"config": {section: {key: value}}, "config_active": ["section.key", ...], ...}

A setting that the file lacks did not exist then: it had the value that means its absence, which is its default, or what
its `option(before=...)` says. `config_active` names the settings that had another value than that, so that an older
version knows which of those that it has never heard of had an effect; in a file without the list, all had.

The method `srste` was once what is `extended-srste` now: files that mean SR-STE itself carry a mark (`MARK`).
"""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path

from slope_megatron.config.reader import SECTIONS, Config

logger = logging.getLogger(__name__)
# Written like a setting of slope with an effect: versions to which `srste` is Extended SR-STE know no such setting and
# refuse the file.
MARK = "exact_gradients"
# Sections that say what the tensors of a checkpoint mean.
WEIGHTS = ("model", "slope")
# What may differ between a run and its continuation: it only says when to stop or what is written, or loss and gradient
# stay the same sums over the global batch, added in another order. Checkpoints know canonical names only, so any layout
# can go on from them. A new micro-batch size changes random numbers and roundings that are keyed to it, for no worse
# ones: dropout (which a new layout changes too), the pruned gradients of `--slope-mode full` and FST, e4m3's scales.
FREE_SECTIONS = ("parallel", "watch")
FREE_KEYS = {
    "data": {"data", "cache", "micro_batch_size"},
    "optimizer": {"adam_backend"},
    "train": {
        "resume",
        "auto_resume",
        "overwrite",
        "deterministic",
        "cuda_graphs",
        "stop_at",
        "eval_interval",
        "save_interval",
        "keep_checkpoints",
        "keep_every",
        "async_save",
        "log_interval",
        "out",
    },
}
FIXED_ON_RESUME = tuple(section for section in SECTIONS if section not in FREE_SECTIONS)


def before(section: str) -> dict:
    """{key: the value that means its absence} of this version's settings."""
    return {field.name: field.metadata["before"] for field in dataclasses.fields(SECTIONS[section][0])}


def saved_form(values: dict[str, dict]) -> dict:
    """The two entries of a file that holds a configuration's `{section: {key: value}}`, or some sections of it."""
    active = [
        f"{section}.{key}"
        for section, part in values.items()
        for key, absent in before(section).items()
        if part[key] != absent
    ]
    if values.get("slope", {}).get("method") == "srste":
        values, active = {**values, "slope": {**values["slope"], MARK: True}}, [*active, f"slope.{MARK}"]
    return {"config": values, "config_active": active}


def without_mark(saved: dict[str, dict]) -> tuple[dict[str, dict], bool]:
    """A saved `{section: {key: value}}` with the method by its present name, and whether that is a new one."""
    slope = dict(saved.get("slope", {}))
    renamed = not slope.pop(MARK, False) and slope.get("method") == "srste"
    if renamed:
        slope["method"] = "extended-srste"
    return {**saved, "slope": slope}, renamed


@dataclasses.dataclass(frozen=True)
class SavedConfig:
    """A saved configuration in this version's terms.

    Args:
        values: {section: {key: value}} of all that this version has.
        missing: `section.key` of those that the file lacks.
        unknown: {`section.key`: value} of settings that had an effect and that this version has not.
        renamed: whether its method had another name.
    """

    values: dict[str, dict]
    missing: list[str]
    unknown: dict[str, object]
    renamed: bool = False

    @classmethod
    def read(cls, content: dict, sections: Collection[str] = tuple(SECTIONS)) -> "SavedConfig":
        """
        Args:
            content: of a file that holds `saved_form`.
            sections: those that it holds.
        """
        saved, renamed = without_mark(content["config"])
        active = content.get("config_active")
        absent = {section: before(section) for section in sections}
        values = {
            section: {key: saved.get(section, {}).get(key, value) for key, value in part.items()}
            for section, part in absent.items()
        }
        missing = [
            f"{section}.{key}" for section, part in values.items() for key in part if key not in saved.get(section, {})
        ]
        unknown = {
            f"{section}.{key}": value
            for section, part in saved.items()
            for key, value in part.items()
            if key not in absent.get(section, {}) and (active is None or f"{section}.{key}" in active)
        }
        return cls(values, missing, unknown, renamed)

    def check(self, where: Path, binding: Collection[str]) -> "SavedConfig":
        """Say in a line each which settings were missing, and which unknown ones do not count here.

        Args:
            where: the file or folder, for people.
            binding: sections of which every setting counts; one that this version has never heard of counts, too.
        Raises:
            ValueError: a setting that counts and that this version has not.
        """
        ignored = set(SECTIONS) - set(binding)
        counting = [name for name in self.unknown if name.partition(".")[0] not in ignored]
        if counting:
            settings = ", ".join(f"{name} {self.unknown[name]!r}" for name in counting)
            raise ValueError(
                f"{where} was written with settings that this version does not have ({settings}): use the version that "
                "wrote it, or a later one"
            )
        if self.renamed:
            logger.info("%s was written when --slope-method srste meant what is extended-srste now", where)
        if self.missing:
            logger.info("%s is older than these settings, which count as absent: %s", where, ", ".join(self.missing))
        if self.unknown:
            logger.warning("%s has settings that this version ignores: %s", where, ", ".join(self.unknown))
        return self

    def config(self) -> Config:
        """Raises ValueError where this version refuses the values."""
        return Config(**{section: SECTIONS[section][0](**part) for section, part in self.values.items()})

    def differences(self, config: Config) -> list[str]:
        """What keeps a run of `config` from going on where the run of this configuration stopped."""
        now = config.to_dict()
        return [
            f"{section}.{key}: {value!r} then, {now[section][key]!r} now"
            for section in FIXED_ON_RESUME
            for key, value in self.values[section].items()
            if now[section][key] != value and key not in FREE_KEYS.get(section, ())
        ]
