"""YAML as people write it today: `6e-4` is a number, `2:4` is text, and a key that is there twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

# YAML 1.2's numbers. YAML 1.1, which PyYAML speaks, reads 6e-4 as text and 2:4 as a number to base 60.
INTEGER = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers; refuses a key that is given twice."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`: what it brings in may be given anew
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(NUMBERS[0], re.compile(rf"^(?:{INTEGER.pattern})$"), list("-+0123456789"))
Loader.add_implicit_resolver(NUMBERS[1], re.compile(rf"^(?:{FLOAT.pattern})$"), list("-+0123456789."))


def read_yaml(path: Path) -> Any:
    """What one YAML file holds; an empty file holds an empty mapping.

    Raises:
        ValueError: no such file, not readable, not UTF-8, or no YAML (with line and column).
    """
    if path.is_dir():
        raise ValueError(f"config file {path} is a folder: give a YAML file such as launch/models/opt-125m.yaml")
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist: give a YAML file such as launch/models/opt-125m.yaml")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ValueError(f"config file {path} cannot be read ({error.strerror}): make it readable") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {path} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ValueError(f"{place}: no valid YAML ({error.problem}): mend that line") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is no valid YAML ({str(error).splitlines()[0]}): mend it") from None
    return {} if content is None else content
