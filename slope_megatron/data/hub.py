"""Documents from the `datasets` library: streamed from the hub, or from a local folder that it can read."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from slope_megatron.data.records import BadRecord, BadRecords

logger = logging.getLogger(__name__)


def hub_documents(
    name: str, config: str | None, text_key: str, bad: BadRecords, start: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield `(name:row, text)` of the train split of dataset `name`, from row `start` on.

    Raises:
        ValueError: the library is missing, the dataset cannot be reached or read, or has no such text column.
    """
    try:
        # First: importing the hub's client sets its log level.
        import datasets
    except ImportError as failure:
        raise ValueError(
            f"source hf:{name} needs the `datasets` library: pip install datasets, or give a .jsonl file"
        ) from failure
    with _quiet_hub():
        rows = iter(_open(datasets, name, config, start))
        number = start
        while True:
            # Streams fetch while they are iterated: they may break off here as well as on opening.
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as failure:
                raise _unreadable(name, failure) from failure
            number += 1
            bad.tally.met += 1
            try:
                text = _text_of_row(row, text_key, f"row {number - 1} of dataset {name}")
            except BadRecord as failure:
                bad.meet(failure)
            else:
                yield f"{name}:{number - 1}", text


def _text_of_row(row: dict, text_key: str, where: str) -> str:
    text = row.get(text_key)
    if not isinstance(text, str):
        columns = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
        raise BadRecord(
            "no string",
            f"{where} has no text in column {text_key!r}: its columns are {columns}; name the text column with "
            "--text-key",
        )
    return text


def _open(datasets, name: str, config: str | None, start: int):
    """Rows in a fixed order from `start` on: streamed, or from a folder that `save_to_disk` wrote.

    Nothing that was fetched is executed or unpickled: the library has given up dataset scripts.
    """
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)["train"]
        elif (Path(name) / "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            # Without a network the client tries for half a minute before it says so.
            logger.info("asking for dataset %s: a local folder, or the hub's", name)
            rows = datasets.load_dataset(name, config, split="train", streaming=True)
        return rows.skip(start) if start else rows
    except Exception as failure:
        raise _unreadable(name, failure) from failure


def _unreadable(name: str, failure: Exception) -> ValueError:
    reason = (str(failure).strip() or type(failure).__name__).split("\n")[0].rstrip(".")
    return ValueError(
        f"dataset {name} cannot be read ({reason}): check the name, the configuration (hf:NAME:CONFIG) and the "
        "network; without a network give a local folder or file"
    )


@contextlib.contextmanager
def _quiet_hub():
    """The hub's client logs every retry; the error that follows says it in one sentence."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
