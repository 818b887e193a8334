"""The checkpoint that a run goes on from: found, verified and loaded by all ranks, which decide alike.

A disk may fail one rank alone. So each says what it sees before all act on it: a checkpoint that one of them cannot
read is damaged for all.
"""

import functools
import logging
import os
from pathlib import Path

from slope_megatron.config import Config
from slope_megatron.storage import metadata, sums, whole
from slope_megatron.training.checkpoint import store
from slope_megatron.training.engine import Engine
from slope_megatron.training.together import Agreed, from_every_rank, on_first_rank, own_share

logger = logging.getLogger(__name__)


def find_checkpoint(config: Config, run: Path) -> Path:
    """The verified checkpoint that a resumed run goes on from. All ranks call it.

    Raises:
        ValueError: on every rank: it is damaged, or of another run; under `--auto-resume`: no checkpoint is intact.
    """
    if config.train.auto_resume:
        return newest_good(run, config)
    folder = on_first_rank(lambda: store.newest(run))
    store.refuse(folder, find_damage(folder))
    on_first_rank(lambda: store.check_state(folder, config))
    return folder


def find_damage(folder: Path) -> str | None:
    """As `sums.find_damage`, the same on every rank. The small files are read by each, the large ones by one each."""
    try:
        names = sorted(sums.read_manifest(folder) or ())
    except sums.Damaged:
        names = []
    shared = {name for name in names if name.endswith(".distcp")}
    own = set(own_share(sorted(shared)))
    found = from_every_rank(sums.find_damage(folder, names=lambda name: name not in shared or name in own))
    rank = next((rank for rank, damage in enumerate(found) if damage), None)
    if rank is None:
        return None
    return found[rank] if all(found) else f"{found[rank]}, as rank {rank} sees it"


def newest_good(run: Path, config: Config, passed: tuple[Path, ...] = ()) -> Path:
    """For jobs that nobody watches: the newest checkpoint that is intact; damaged ones after it are set aside.

    Args:
        passed: found damaged before; the search goes on behind them.
    Raises:
        Agreed: none is intact, or it is of another run.
    """
    candidates = [folder for folder in on_first_rank(lambda: store.entries(run)[::-1]) if folder not in passed]
    for index, folder in enumerate(candidates):
        damage = find_damage(folder)
        if damage is None:
            on_first_rank(functools.partial(store.check_state, folder, config))
            on_first_rank(functools.partial(set_aside, (*passed, *candidates[:index])))
            return folder
        pass_over(f"{folder} is corrupt: its file {damage}")
    looked = len(candidates) + len(passed)
    aside = len(on_first_rank(lambda: store.entries(run, store.SET_ASIDE)))
    more = f", {aside} set aside before" if aside else ""
    raise Agreed(
        f"no checkpoint of {run} is intact ({looked} looked at{more}): give another --out, or start anew with "
        "--overwrite"
    )


def pass_over(what: str) -> None:
    logger.warning("%s: set aside, taking the one before it", what)


def set_aside(folders: tuple[Path, ...]) -> None:
    """Out of the list of checkpoints by a rename; nothing is deleted."""
    for folder in folders:
        names = (f"{folder.name}.corrupt{number or ''}" for number in range(len(os.listdir(folder.parent)) + 1))
        target = next(folder.with_name(name) for name in names if not os.path.lexists(folder.with_name(name)))
        try:
            os.rename(folder, target)
        except OSError as error:
            logger.warning("checkpoint %s could not be set aside (%s): it is left", folder, whole.reason(error))


def load(engine: Engine, folder: Path) -> Path:
    """`store.load`; under `--auto-resume` the one before, where reading it fails after all. All ranks call it.

    Returns:
        the checkpoint that was loaded.
    Raises:
        Damaged, Refused: on every rank: it is damaged.
        Agreed: under `--auto-resume`: no checkpoint is intact.
    """
    passed: tuple[Path, ...] = ()
    while True:
        try:
            store.load(engine, folder)
            return folder
        except (sums.Damaged, metadata.Refused) as error:
            if not engine.config.train.auto_resume:
                raise
            pass_over(str(error).partition(";")[0])
            passed = (*passed, folder)
            folder = newest_good(Path(engine.config.train.out), engine.run_config, passed)


def what_is_safe(run: Path) -> str:
    """For the message of a fault: what is kept, and how to go on."""
    newest = store.newest_known(run)
    if newest is None:
        return "No checkpoint was written yet: start anew with --overwrite."
    return f"Checkpoint {newest} is complete: the same command with --resume goes on from it."
