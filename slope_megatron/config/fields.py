"""Dataclass fields that are also command-line flags and YAML keys: declared once, read once, with their origin."""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from pathlib import Path

from slope_megatron.config.yaml_file import read_yaml

AS_DEFAULT = object()


class Rule(typing.NamedTuple):
    """What a field's value must be: in words, and as a test of a value that is set."""

    words: str
    holds: Callable[[typing.Any], bool]


COUNT = Rule("it must be at least 1", lambda value: value >= 1)
POSITIVE = Rule("it must be positive", lambda value: value > 0)
NOT_NEGATIVE = Rule("it must not be negative", lambda value: value >= 0)
OFF_OR_POSITIVE = Rule("it must be 0 (off) or positive", lambda value: value >= 0)
SHARE = Rule("it must be in [0, 1]", lambda value: 0 <= value <= 1)


def option(default, help: str, *, choices: tuple | None = None, must: Rule | None = None, before=AS_DEFAULT):
    """A config field with its manual line.

    Args:
        choices, must: checked for flags and YAML alike.
        before: the value that means what runs did before there was this field, where that is not the default.
    """
    before = default if before is AS_DEFAULT else before
    metadata = {"help": help, "choices": choices, "must": must, "before": before}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(name: str, prefix: str = "") -> str:
    """`hidden_size` -> `--hidden-size`; with prefix `slope`: `nm` -> `--slope-nm`, `enabled` -> `--slope`."""
    if prefix and name == "enabled":
        return f"--{prefix}"
    return "--" + "-".join(filter(None, (prefix, name.replace("_", "-"))))


def scalar_type(annotation) -> type:
    """The type that one flag value is parsed with: `int | None` -> int; `int | str` -> str, which its class reads."""
    if isinstance(annotation, types.UnionType):
        if str in typing.get_args(annotation):
            return str
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def add_arguments(parser: argparse.ArgumentParser, config_class: type, title: str, prefix: str = "") -> None:
    """One argparse group for `config_class`. Unset flags stay absent, so that YAML and defaults show through."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, flag = scalar_type(hints[field.name]), flag_of(field.name, prefix)
        dest = destination(config_class, field.name)
        line = f"{field.metadata['help']}{default_text(field.default)}".replace("%", "%%")
        if kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, dest=dest, default=argparse.SUPPRESS, help=line)
        else:
            choices = field.metadata["choices"]
            metavar = "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()
            group.add_argument(flag, type=kind, metavar=metavar, dest=dest, default=argparse.SUPPRESS, help=line)


def default_text(default) -> str:
    """How the manual gives a default; where it is empty, the line itself says what unset means."""
    if default is None or default == "":
        return ""
    return f" (default: {('off', 'on')[default] if isinstance(default, bool) else default})"


def destination(config_class: type, name: str) -> str:
    return f"{config_class.__name__}.{name}"


def check_fields(config, flag_prefix: str = "") -> None:
    """Refuse a value of another type, outside its field's choices, or against its field's rule."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = scalar_type(hints[field.name])
        flag = flag_of(field.name, flag_prefix)
        if value is None and field.default is None:
            continue
        if set(typing.get_args(hints[field.name])) == {int, str} and type(value) in (int, str):
            continue
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if type(value) is not kind and not number:
            raise ValueError(
                f"{flag} is {value!r}: it must be of type {kind.__name__}; write e.g. {flag} {field.default}"
            )
        choices = field.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{flag} is {value!r}: it must be one of {', '.join(map(str, choices))}")
        rule = field.metadata["must"]
        if rule and not rule.holds(value):
            unset = ", or unset" if field.default is None else ""
            raise ValueError(f"{flag} is {value!r}: {rule.words}{unset}")


def load_yaml(path: Path, sections: dict[str, type]) -> dict[str, dict]:
    """One YAML file of `{section: {field: value}}`, checked against the sections' fields.

    Raises:
        ValueError: no such file, no YAML, not a mapping, an unknown section or an unknown key.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"config file {path} holds {type(content).__name__}: it must map sections to keys and values")
    return check_sections(content, sections, str(path))


def check_sections(content: dict, sections: dict[str, type], where: str) -> dict[str, dict]:
    """`{section: {field: value}}` as it is, if the sections and their fields exist; `where` it stands, for the message.

    Raises:
        ValueError: an unknown section or an unknown key.
    """
    for section, values in content.items():
        if section not in sections:
            raise ValueError(f"{where}: unknown section {section!r}{unknown_section_hint(str(section), sections)}")
        if not isinstance(values, dict):
            raise ValueError(f"{where}: section {section!r} holds {values!r}: it must map keys to values")
        known = field_names(sections[section])
        for key in values:
            if key not in known:
                raise ValueError(f"{where}: unknown key {section}.{key}{unknown_key_hint(str(key), section, sections)}")
    return content


def field_names(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def nearest(word: str, known: list[str], section: str = "") -> str | None:
    """The key that was meant: a flag's spelling is the key's, a typing error is near it."""
    word = word.lstrip("-").replace("-", "_").removeprefix(f"{section}_")
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)


def unknown_section_hint(section: str, sections: dict[str, type]) -> str:
    """The way out for a section that does not exist: often it is a key that was written without one."""
    for name, config_class in sections.items():
        if section.replace("-", "_") in field_names(config_class):
            return f": it is a key of section {name!r}; write it below a line `{name}:`"
    near = nearest(section, list(sections))
    hint = f": did you mean {near!r}?" if near else ";"
    return f"{hint} the sections are {', '.join(sections)}"


def unknown_key_hint(key: str, section: str, sections: dict[str, type]) -> str:
    """The way out for a key that its section does not have."""
    near = nearest(key, field_names(sections[section]), section)
    if near:
        return f": did you mean {near}?"
    homes = [name for name, config_class in sections.items() if key in field_names(config_class)]
    if homes:
        return f": it belongs to section {homes[0]!r}"
    return f"; the keys are {', '.join(field_names(sections[section]))}"
