"""Prompts from a file or from standard input: a line each, or the `prompt` of each record."""

import logging
import sys
from pathlib import Path

from slope_megatron.config.text_file import decode, lines_of, not_text
from slope_megatron.data.compressed import opened
from slope_megatron.data.formats import Layout, layout_of
from slope_megatron.data.records import BadRecord, read_rows

KEY = "prompt"
logger = logging.getLogger(__name__)


def read_prompts_of(name: str) -> list[str]:
    """The prompts of a file, packed or not; `-`: of standard input. Lines without text are none, and counted.

    Raises:
        ValueError: no such file, one that cannot be read, a record without a prompt, or nothing in it.
    """
    path = Path(name)
    if name != "-" and not path.is_file():
        raise ValueError(f"--prompts {name} is no file: give one with a prompt in each line, or -")
    layout = layout_of(path) if name != "-" else Layout("text", "")
    if layout.format == "other":
        raise ValueError(f"--prompts {name} is of no format that is read: give text, or records with {KEY!r}")
    lines = _lines(name, layout) if layout.format == "text" else _of_records(path, layout)
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {name} holds no prompt: put one in each line")
    if len(prompts) < len(lines):
        logger.warning("--prompts %s: %d prompts; passed over: %d empty", name, len(prompts), len(lines) - len(prompts))
    return prompts


def _lines(name: str, layout: Layout) -> list[str]:
    if name == "-":
        content = sys.stdin.buffer.read()
    else:
        with opened(Path(name), layout.compressed) as file:
            content = file.read()
    try:
        return lines_of(decode(content))
    except UnicodeDecodeError as error:
        raise ValueError(not_text(f"--prompts {name}", error)) from None


def _of_records(path: Path, layout: Layout) -> list[str]:
    way_out = f'every record must be like {{"{KEY}": "..."}}'
    prompts = []
    for number, row in read_rows(path, layout, way_out):
        if isinstance(row, BadRecord):
            raise ValueError(f"--prompts {row}")
        if not isinstance(row.get(KEY), str):
            raise ValueError(f"--prompts {path}:{number} has no text under {KEY!r}: {way_out}")
        prompts.append(row[KEY])
    return prompts
