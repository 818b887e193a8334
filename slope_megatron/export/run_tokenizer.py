"""The tokenizer of a run: that of its data, or a given one that gives the same ids."""

import logging
from pathlib import Path

from slope_megatron.config.json_file import read_json
from slope_megatron.data.fast_tokenizer import FastTokenizer
from slope_megatron.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from slope_megatron.data.tokenizer_json import first_difference
from slope_megatron.storage import sums

logger = logging.getLogger(__name__)


def choose_tokenizer(run: Path, data: Path, given: Path | None) -> Path | None:
    """The folder or file of the tokenizer; None, with a line in the log, where there is none any more.

    Raises:
        ValueError: there is nothing at `given`, or the run's own is damaged.
    """
    if given is not None:
        if not given.exists():
            raise ValueError(f"the tokenizer {given} does not exist: give --tokenizer a file or a folder")
        return given
    found = own_tokenizer(run, data)
    if found is None:
        logger.warning("the run's data folder %s is gone: no tokenizer; give --tokenizer", data)
    else:
        check_written(found)
    return found


def check_written(folder: Path) -> None:
    """
    Raises:
        ValueError: a tokenizer's file in prepared data is not what was written.
    """
    manifest = folder / "manifest.json"
    entries = read_json(manifest, "give --tokenizer").get("files", {}) if manifest.is_file() else {}
    for name, entry in entries.items():
        found = None if name.endswith((".bin", ".idx")) else sums.difference(folder / name, entry)
        if found:
            raise ValueError(f"{folder / name} is not what was written (it {found}): copy it, or give --tokenizer")


def own_tokenizer(run: Path, data: Path) -> Path | None:
    """The folder of the tokenizer that a run was trained with, where it is still there."""
    # The data may have moved together with the run: `slope quickstart` writes both into one folder.
    folders = (run, data, run.parent / "data")
    return next((folder for folder in folders if folder.is_dir() and find_tokenizer(folder)), None)


def check_given(given: Tokenizer | FastTokenizer, path: Path, own: Path | None) -> None:
    """
    Args:
        path: where `given` is from; own: the folder of the one that the run was trained with, if it is there.
    Raises:
        ValueError: another end of a document, or other ids for a text.
    """
    if own is None:
        return
    trained = load_tokenizer(own)
    text = first_difference(trained.encode, given.encode, (trained.eod_text,))
    if text is not None or trained.eod != given.eod:
        what = f"gives {text!r} other ids" if text is not None else f"ends a document with {given.eod_text}"
        raise ValueError(
            f"--tokenizer {path} {what} than the one that the run was trained with ({own}): leave --tokenizer out"
        )
