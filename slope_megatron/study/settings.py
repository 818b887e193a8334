"""A study's YAML file, read once: what its runs share, and the groups of runs that are products of named parts.

    corpus    source: a folder or file of text; the other keys are `slope data prepare`'s settings
    base      sections of a `slope pretrain` settings file, which all runs share
    sizes     NAME: keys of section `model`
    methods   NAME: sections that differ from the base; and `like`, whose best learning rate it takes (unset: its own),
              `time_as`, `memory_as`, whose speed-up and bytes the charts give it, `narrow` (`controls`)
    groups    NAME: sizes x methods x lr x seeds, trained on tokens_per_parameter tokens a parameter of the size;
              `more_lr`: METHOD: learning rates that this one has besides
    speedups  MODEL: METHOD: tokens/s over the dense model's, as `slope bench model` measures a whole model

lr is a list, or {best_of: GROUP, exponent: X, times: [...]}: the best one of that group's rows for the method, times
(parameters / the group's parameters)^X. Parameters are those of the dense model of a size, without its embeddings.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slope_megatron.config.fields import check_sections, field_names, nearest
from slope_megatron.config.model import ModelConfig
from slope_megatron.config.reader import SECTIONS
from slope_megatron.config.shipped import config_file
from slope_megatron.config.yaml_file import read_yaml
from slope_megatron.data.settings import PrepareSettings

SECTION_CLASSES = {section: config_class for section, (config_class, _, _) in SECTIONS.items()}
# What a narrowed dense model is made equal in (`controls`).
EQUAL_IN = ("flops", "state_bytes", "parameters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Narrow:
    """A dense model made as narrow as to cost what a method costs.

    Args:
        to: one of EQUAL_IN.
        of: the method.
        speedup: for flops, the model of `speedups`: the target is the dense model's FLOPs over that of the method.
    """

    to: str
    of: str
    speedup: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What one method changes in the base; which others it is tuned and counted as (empty: itself); see the module."""

    sections: dict[str, dict]
    like: str = ""
    time_as: str = ""
    memory_as: str = ""
    narrow: Narrow | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOf:
    """A learning rate that the rows of a group tell; `times`: factors of it, a run each."""

    best_of: str
    exponent: float = 0.0
    times: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One product of runs, in the order size, method, learning rate, seed; see the module."""

    sizes: tuple[str, ...]
    methods: tuple[str, ...]
    lr: tuple[float, ...] | BestOf
    tokens_per_parameter: float
    seeds: tuple[int, ...] = (1,)
    more_lr: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def rates(self, method: str) -> tuple[float, ...]:
        """The learning rates of a group that lists them."""
        assert not isinstance(self.lr, BestOf)
        return tuple(sorted({*self.lr, *self.more_lr.get(method, ())}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The file's content; see the module."""

    name: str
    corpus: dict[str, Any]
    base: dict[str, dict]
    sizes: dict[str, dict]
    methods: dict[str, Method]
    groups: dict[str, Group]
    speedups: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def tuned_as(self, method: str) -> str:
        """The method whose best learning rate this one takes."""
        return self.methods[method].like or method

    def timed_as(self, method: str) -> str:
        """The method whose speed-up is that of this one's sparse steps."""
        return self.methods[method].time_as or method

    def sized_as(self, method: str) -> str:
        """The method whose bytes are counted for this one."""
        return self.methods[method].memory_as or method


def read_study(path: Path) -> Study:
    """The study of a file, or of `study/NAME` that comes with this package.

    Raises:
        ValueError: one sentence on the first thing that is wrong, with its place in the file.
    """
    path = config_file(path)
    content = mapping(read_yaml(path), f"study {path}")
    allowed = [name for name in field_names(Study) if name != "name"]
    known_keys(content, allowed, str(path), needs=("base", "sizes", "methods", "groups"))
    corpus = mapping(content.get("corpus", {}), f"{path}: corpus")
    known_keys(corpus, ["source", *field_names(PrepareSettings)], f"{path}: corpus")
    study = Study(
        name=path.stem,
        corpus=corpus,
        base=check_sections(mapping(content["base"], f"{path}: base"), SECTION_CLASSES, f"{path}: base"),
        sizes=named(content, "sizes", path, read_size),
        methods=named(content, "methods", path, read_method),
        groups=named(content, "groups", path, read_group),
        speedups=named(content, "speedups", path, mapping) if "speedups" in content else {},
    )
    check_names(study, path)
    return study


def named(content: dict, part: str, path: Path, read) -> dict[str, Any]:
    """`{NAME: ...}` of one part, each entry read by `read(value, where)`; names stand in run names and paths."""
    entries = mapping(content[part], f"{path}: {part}")
    if not entries:
        raise ValueError(f"{path}: {part} names none: add one, or leave the key out")
    for name in entries:
        if not isinstance(name, str) or not name or any(not (letter.isalnum() or letter in "._%+-") for letter in name):
            raise ValueError(f"{path}: {part} names {name!r}: names are letters, digits and . _ % + -; rename it")
    return {name: read(value, f"{path}: {part}.{name}") for name, value in entries.items()}


def read_size(value, where: str) -> dict:
    return check_sections({"model": mapping(value, where)}, {"model": ModelConfig}, where)["model"]


def read_method(value, where: str) -> Method:
    content = dict(mapping(value, where))
    others = {key: content.pop(key, "") for key in ("like", "time_as", "memory_as")}
    narrow = content.pop("narrow", None)
    if narrow is not None:
        known_keys(mapping(narrow, f"{where}.narrow"), field_names(Narrow), f"{where}.narrow", needs=("to", "of"))
        if narrow["to"] not in EQUAL_IN:
            raise ValueError(f"{where}.narrow.to is {narrow['to']!r}: it must be one of {', '.join(EQUAL_IN)}")
        if (narrow["to"] == "flops") != ("speedup" in narrow):
            raise ValueError(f"{where}.narrow: `to: flops` needs a `speedup`, a model of `speedups`, and no other does")
        narrow = Narrow(**narrow)
    sections = check_sections(content, SECTION_CLASSES, where)
    return Method(sections=sections, narrow=narrow, **others)


def read_group(value, where: str) -> Group:
    content = dict(mapping(value, where))
    known_keys(content, field_names(Group), where, needs=("sizes", "methods", "lr", "tokens_per_parameter"))
    lr = content["lr"]
    if isinstance(lr, dict):
        known_keys(lr, field_names(BestOf), f"{where}.lr", needs=("best_of",))
        times = numbers(lr.get("times", [1.0]), f"{where}.lr.times")
        exponent = number(lr.get("exponent", 0.0), f"{where}.lr.exponent", positive=False)
        content["lr"] = BestOf(best_of=lr["best_of"], exponent=exponent, times=times)
    else:
        content["lr"] = numbers(lr, f"{where}.lr")
    more = mapping(content.get("more_lr", {}), f"{where}.more_lr")
    if more and isinstance(lr, dict):
        raise ValueError(f"{where}.more_lr goes with a list of lr alone: leave it out, or use lr.times")
    content["more_lr"] = {name: numbers(own, f"{where}.more_lr.{name}") for name, own in more.items()}
    for key in ("sizes", "methods", "seeds"):
        if key in content:
            content[key] = tuple(listed(content[key], f"{where}.{key}"))
    number(content["tokens_per_parameter"], f"{where}.tokens_per_parameter")
    if not all(type(seed) is int for seed in content.get("seeds", ())):
        raise ValueError(f"{where}.seeds is {list(content['seeds'])}: seeds are whole numbers")
    return Group(**content)


def check_names(study: Study, path: Path) -> None:
    """Whatever is called by name must be there.

    Raises:
        ValueError: it is not.
    """

    def there(name, known: Iterable[str], where: str) -> None:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{path}: {where} names {name!r}, which is not there: {', '.join(known)} are")

    for name, method in study.methods.items():
        there(study.tuned_as(name), study.methods, f"methods.{name}.like")
        there(study.timed_as(name), study.methods, f"methods.{name}.time_as")
        there(study.sized_as(name), study.methods, f"methods.{name}.memory_as")
        if method.narrow:
            there(method.narrow.of, study.methods, f"methods.{name}.narrow.of")
            if study.methods[method.narrow.of].narrow:
                raise ValueError(f"{path}: methods.{name}.narrow.of is itself narrowed: name a method that is not")
            if method.narrow.speedup:
                there(method.narrow.speedup, study.speedups, f"methods.{name}.narrow.speedup")
                cost = study.timed_as(method.narrow.of)
                there(cost, study.speedups[method.narrow.speedup], f"methods.{name}.narrow.of")
    for name, group in study.groups.items():
        for part in ("sizes", "methods"):
            for used in getattr(group, part):
                there(used, getattr(study, part), f"groups.{name}.{part}")
        for used in group.more_lr:
            there(used, group.methods, f"groups.{name}.more_lr")
        if isinstance(group.lr, BestOf):
            check_best_of(study, name, group, group.lr, path)
    for model, own in study.speedups.items():
        for used in own:
            there(used, study.methods, f"speedups.{model}")
            number(own[used], f"{path}: speedups.{model}.{used}")


def check_best_of(study: Study, name: str, group: Group, lr: BestOf, path: Path) -> None:
    """The group that tells a learning rate must be a sweep, at one size, of the methods in question."""
    source = study.groups.get(lr.best_of) if isinstance(lr.best_of, str) else None
    if source is None or isinstance(source.lr, BestOf) or len(source.sizes) != 1:
        raise ValueError(
            f"{path}: groups.{name}.lr.best_of is {lr.best_of!r}: it must be a group of one size with a list of lr"
        )
    missing = sorted({study.tuned_as(method) for method in group.methods} - set(source.methods))
    if missing:
        raise ValueError(
            f"{path}: groups.{name} takes the best lr of group {lr.best_of}, which does not sweep "
            f"{', '.join(missing)}: add it there, or say `like:` in the method"
        )


def mapping(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {value!r}: it must map names to values")
    return value


def listed(value, where: str) -> list:
    if not isinstance(value, list) or not value or len(set(map(str, value))) < len(value):
        raise ValueError(f"{where} is {value!r}: it must be a list with an entry at least, none of them twice")
    return value


def numbers(value, where: str) -> tuple[float, ...]:
    """A list of different positive numbers, as floats."""
    return tuple(number(entry, where) for entry in listed(value, where))


def number(value, where: str, positive: bool = True) -> float:
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_one or (positive and value <= 0):
        raise ValueError(f"{where} holds {value!r}: it must be a {'positive ' if positive else ''}number")
    return float(value)


def known_keys(content: dict, known: list[str], where: str, needs: Iterable[str] = ()) -> None:
    """Refuse a key that nobody reads, or one that is missing."""
    for key in content:
        if key not in known:
            near = nearest(str(key), known)
            hint = f": did you mean {near}?" if near else f"; the keys are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    missing = [key for key in needs if key not in content]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}: add it")
