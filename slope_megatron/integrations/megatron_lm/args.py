"""SlopeConfig's flags for any script with Megatron's kind of argument parser, and the start-up table of all values.

    parse_args(extra_args_provider=add_slope_arguments)     the flags; without --slope the model stays dense
    slope_config_from_args(args)                            the SlopeConfig they mean

The names are those of `slope pretrain`, of the YAML section `slope` and of the dataclass: one declaration, in
`slope_megatron.config`.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path

from slope_megatron.config import Config, SlopeConfig
from slope_megatron.config.fields import add_arguments, destination, flag_of, load_yaml
from slope_megatron.config.reader import SECTIONS

TITLE, PREFIX = SECTIONS["slope"][1:]


def add_slope_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--slope`, `--slope-nm`, ... and `--slope-config FILE`; returns the parser, as Megatron wants it."""
    add_arguments(parser, SlopeConfig, TITLE, PREFIX)
    parser.add_argument("--slope-config", metavar="YAML", help="file with a section `slope`; flags win over it")
    return parser


def slope_config_from_args(args: argparse.Namespace) -> SlopeConfig:
    """What the flags mean. Unlike in `slope pretrain`, sparsity must be asked for: `--slope`, or `enabled` in the file.

    Raises:
        ValueError: a wrong value; or flags of sparsity without `--slope`, which would train a dense model in silence.
    """
    values: dict = {"enabled": False}
    path = getattr(args, "slope_config", None)
    if path:
        values["enabled"] = True
        values |= load_yaml(Path(path), {"slope": SlopeConfig}).get("slope", {})
    names = [field.name for field in dataclasses.fields(SlopeConfig)]
    given = {name: vars(args)[key] for name in names if (key := destination(SlopeConfig, name)) in vars(args)}
    values |= given
    if not values["enabled"] and "enabled" not in given and given:
        flags = ", ".join(flag_of(name, PREFIX) for name in given)
        raise ValueError(f"{flags} without --slope: the model would be dense; add --slope, or leave them out")
    return SlopeConfig(**values)


def value_table(config: Config, origins: dict[str, str]) -> str:
    """Every effective value and where it came from: `origins` of `read_config`, or the default."""
    rows = [
        (
            SECTIONS[section][1],
            flag_of(key, SECTIONS[section][2]),
            str(value),
            origins.get(f"{section}.{key}", "default"),
        )
        for section, values in config.to_dict().items()
        for key, value in values.items()
    ]
    flag_width = max(len(flag) for _, flag, _, _ in rows)
    value_width = max(len(value) for _, _, value, _ in rows)
    lines = []
    for title, group in itertools.groupby(rows, key=lambda row: row[0]):
        lines.append(title)
        lines += [f"  {flag:{flag_width}}  {value:{value_width}}  {origin}" for _, flag, value, origin in group]
    return "\n".join(lines)
