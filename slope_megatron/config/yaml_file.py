"""YAML 1.2 by its core schema: `6e-4` and `0100` are numbers, `2:4`, `no` and `1_000` are text, no key comes twice."""

from pathlib import Path
from typing import Any

import yaml
import yamlcore

from slope_megatron.config.text_file import read_text

# Line ends in YAML 1.1 and for the parser, ordinary characters in YAML 1.2: a comment would end at one unseen.
FORMER_LINE_ENDS = {"\x85": "U+0085", "\u2028": "U+2028", "\u2029": "U+2029"}


def read_yaml(path: Path) -> Any:
    """What one YAML file holds; an empty file holds an empty mapping.

    Raises:
        ValueError: no such file, not readable, not UTF-8, several documents, or no YAML (with line and column).
    """
    if path.is_dir():
        raise ValueError(f"config file {path} is a folder: give a YAML file such as launch/models/opt-125m.yaml")
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist: give a YAML file such as launch/models/opt-125m.yaml")
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"config file {error}") from None
    for character, name in FORMER_LINE_ENDS.items():
        if character in text:
            line = text.count("\n", 0, text.index(character)) + 1
            raise ValueError(f"{path}:{line}: {name} ends a line in old YAML and not in new: take it out of the file")
    try:
        content = yaml.load(text, yamlcore.CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        second = error.context and "single document" in error.context
        problem = "a second document begins here" if second else error.problem
        raise ValueError(f"{where}: no valid YAML ({problem}): mend that line") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is no valid YAML ({str(error).split(chr(10))[0]}): mend it") from None
    except RecursionError:
        raise ValueError(f"config file {path} is nested too deeply: mend it") from None
    except (ValueError, KeyError, IndexError) as error:  # a tag such as !!int in front of what is none
        raise ValueError(f"config file {path} has a value that is not what its tag says ({error}): mend it") from None
    return {} if content is None else content


def write_yaml(path: Path, content: Any) -> None:
    """Write what `read_yaml` reads back: text that YAML 1.2 would take for something else is quoted."""
    path.write_text(yaml.dump(content, Dumper=yamlcore.CoreDumper, sort_keys=False), encoding="utf-8")
