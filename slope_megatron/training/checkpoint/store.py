"""Checkpoints: one format, by canonical names, that does not know the layout that wrote it.

    RUN/checkpoints/step_00000500/   megatron-core distributed checkpoint: values, patterns, adapters, masters, moments
                    .../state.json   configuration, steps done, optimizer step counters
                    .../manifest.json  sizes and checksums of every file, and of each tensor in it
    RUN/checkpoints/latest           name of the newest complete one, written last

A checkpoint appears by one rename when all of it is on disk, and disappears by one. Random states and the data position
are functions of the step, so nothing of them is saved.
"""

import copy
import logging
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist

from slope_megatron.config import Config
from slope_megatron.config.json_file import read_json
from slope_megatron.config.saved import FIXED_ON_RESUME, SavedConfig, saved_form
from slope_megatron.storage import latest, sums, whole
from slope_megatron.training.checkpoint.engine_state import (
    install_engine_state,
    install_loss_scaler,
    link_optimizer_state,
    loss_scaler_state,
    optimizer_steps,
    sharded_engine_state,
)
from slope_megatron.training.checkpoint.other_form import OtherForm
from slope_megatron.training.checkpoint.sharded_load import load_sharded
from slope_megatron.training.checkpoint.snapshot import Snapshot, Written
from slope_megatron.training.engine import Engine
from slope_megatron.training.together import on_first_rank

logger = logging.getLogger(__name__)
FORMAT = 1
STEP = re.compile(r"step_(\d{8,})")
SET_ASIDE = re.compile(r"step_\d{8,}\.corrupt.*")


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


# -- save --------------------------------------------------------------------------------------------------------------


class Saving:
    """A checkpoint of the present step on its way to the disk: begun by all ranks, written by each, finished by all.

    Begin and finish are collective. Between them `write` touches the disk and talks to nobody, so that it may run in a
    thread while training goes on.
    """

    def __init__(self, engine: Engine, run: Path):
        self.run = run
        self.settings = engine.config.train
        self.target = folder_of(run, engine.steps_done)
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        if dist.get_rank() == 0:
            # Before the first collective: no rank writes until this one has joined it.
            shutil.rmtree(self.partial, ignore_errors=True)
        link_optimizer_state(engine)
        self.state = {
            "format": FORMAT,
            "steps_done": engine.steps_done,
            "optimizer_steps": optimizer_steps(engine),
            "loss_scaler": loss_scaler_state(engine),
            "attempts": copy.deepcopy(engine.attempts),
            "form": engine.form,
            **saved_form(engine.run_config.to_dict()),
        }
        self.snapshot = Snapshot(sharded_engine_state(engine, filled=True))
        self.written: Written | None = None
        self.problem: str | None = None

    def write(self) -> None:
        """This rank's file; what goes wrong is kept for `finish`."""
        try:
            self.written = self.snapshot.write(self.partial)
        except Exception as error:
            self.problem = f"rank {dist.get_rank()}: {whole.reason(error)}"

    def finish(self) -> str | None:
        """Complete and publish it, or remove what there is of it; older checkpoints stay as they are.

        Returns:
            why it could not be written, the same on every rank; None: it is there.
        """
        parts: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((self.written, self.problem), parts, dst=0)
        return on_first_rank(lambda: self.complete(parts))

    def complete(self, parts) -> str | None:
        """Rank 0's share, given what each rank has written and met; returns why it failed."""
        problem = next((met for _, met in parts if met), None)
        try:
            if problem is None:
                manifest = self.snapshot.write_index(self.partial, [written for written, _ in parts])
                whole.write_json(self.partial / "state.json", self.state)
                manifest["state.json"] = sums.seal(self.partial / "state.json")
                publish(self.partial, self.target, manifest)
        except Exception as error:
            problem = f"rank 0: {whole.reason(error)}"
        if problem:
            shutil.rmtree(self.partial, ignore_errors=True)
        elif self.settings.save_interval:
            prune(self.run, self.settings.keep_checkpoints, self.settings.keep_every)
        return problem


def publish(partial: Path, target: Path, manifest: dict[str, dict]) -> None:
    """Seal a complete folder with its manifest, give it its name, and only then point `latest` at it."""
    whole.write_json(partial / "manifest.json", manifest)
    whole.sync(partial)
    if target.exists():
        # A name without a digit at its end never counts as a checkpoint; the next start removes it.
        os.rename(target, target.with_name(f"{target.name}.old.partial"))
    os.rename(partial, target)
    whole.sync(target.parent)
    latest.point_at(target)


def entries(run: Path, names: re.Pattern = STEP) -> list[Path]:
    """What bears a checkpoint's name, whole or not, oldest first.

    Args:
        names: `SET_ASIDE` has those that were found damaged.

    Raises:
        ValueError: the folder cannot be listed.
    """
    folder = run / "checkpoints"
    try:
        return sorted(folder / name for name in os.listdir(folder) if names.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed ({error.strerror}): make it readable, or mend its disk") from None


def complete_checkpoints(run: Path) -> list[Path]:
    """Sealed checkpoints of a run, oldest first; whether they are intact is another question."""
    return [folder for folder in entries(run) if _is_sealed(folder)]


def newest_known(run: Path) -> Path | None:
    """For messages: the newest sealed checkpoint, as far as the folder can be listed now."""
    try:
        return next(reversed(complete_checkpoints(run)), None)
    except ValueError:
        return None


def _is_sealed(folder: Path) -> bool:
    try:
        return (folder / sums.CHECKPOINT).exists()
    except OSError:  # not to be looked at: it is there, and whoever verifies it says why it cannot be read
        return True


def prune(run: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep`, and those of every `keep_every`-th step; what cannot be removed is logged."""
    try:
        old = complete_checkpoints(run)[:-keep]
    except ValueError as error:
        logger.warning("no old checkpoint is removed: %s", error)
        return
    for folder in old:
        if not keep_every or step_of(folder) % keep_every:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint; if that fails, it is logged."""
    try:
        # Out of the list by one rename first: half of a checkpoint must never look like one.
        doomed = folder.with_name(f"{folder.name}.old.partial")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("checkpoint %s could not be removed: %s", folder, whole.reason(error))


def remove_unwanted(run: Path) -> None:
    """At the end of a run that is not to be saved: what it wrote where its form changed is no result of it.

    What cannot be read or removed is logged.
    """
    try:
        for folder in complete_checkpoints(run):
            if not read_json(folder / "state.json", way_out(folder))["config"]["train"]["save_interval"]:
                remove(folder)
        if left := newest_known(run):
            latest.point_at(left)
        else:
            (run / "checkpoints" / latest.NAME).unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        logger.warning("checkpoints of the changes of form are left: %s", error)


def remove_partial(run: Path) -> None:
    """What runs that died left half-written or half-removed; rank 0 calls it before the first save."""
    for folder in (run / "checkpoints").glob("*.partial"):
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink(missing_ok=True)


# -- load --------------------------------------------------------------------------------------------------------------


def newest(run: Path) -> Path:
    """The checkpoint to go on from: the one that `latest` names, or the newest there is when it names none.

    Raises:
        ValueError: there is none.
    """
    complete = complete_checkpoints(run)
    if not complete:
        raise ValueError(f"{run} has no complete checkpoint to resume from: start anew with --overwrite")
    return latest.find(complete)


def refuse(folder: Path, damage: str | None) -> None:
    """
    Args:
        damage: as `sums.find_damage` words it; None: there is none.
    Raises:
        Damaged: there is; names the checkpoint to use instead.
    """
    if damage:
        raise sums.damaged(folder, damage, way_out(folder))


def way_out(folder: Path) -> str:
    """What to do about a checkpoint that is damaged."""
    others = [other.name for other in complete_checkpoints(folder.parent.parent) if other != folder]
    return f"remove {folder} to resume from {others[-1]}" if others else "start anew with --overwrite"


def check_state(folder: Path, config: Config) -> dict:
    """`state.json` of an intact checkpoint that belongs to `config`.

    Raises:
        ValueError: it is of another format, or of another model or schedule.
    """
    state = read_json(folder / "state.json", way_out(folder))
    if state["format"] != FORMAT:
        raise ValueError(
            f"checkpoint {folder} has format {state['format']} and this version reads {FORMAT}: use the "
            "version that wrote it"
        )
    differences = SavedConfig.read(state).check(folder, FIXED_ON_RESUME).differences(config)
    if differences:
        raise ValueError(
            f"checkpoint {folder} is of another run ({'; '.join(differences)}): give the same settings, "
            "or another --out"
        )
    return state


def form_of(state: dict, config: Config) -> str:
    """The form of the model in a checkpoint of `config`'s run: sparse or dense; one without a note never changed it."""
    return state.get("form") or ("sparse" if config.slope.enabled else "dense")


def load(engine: Engine, folder: Path) -> None:
    """Restore an engine built from the same configuration, in either form; all ranks call it. Rank 0 has called
    `check_state`.

    Raises:
        Damaged, Refused: on every rank, as `load_sharded`; the engine can load another checkpoint then.
    """
    link_optimizer_state(engine)
    state = read_json(folder / "state.json", way_out(folder))
    other = OtherForm(engine) if form_of(state, engine.run_config) != engine.form else None
    sharded = other.sharded_state() if other else sharded_engine_state(engine, filled=False)
    loaded = load_sharded(sharded, folder, way_out(folder))
    install_engine_state(engine, other.converted(loaded) if other else loaded, state["optimizer_steps"])
    if other:
        other.choose_derived()
        pruned = ", pruned by magnitude" if engine.form == "sparse" else ""
        logger.info("%s is of the model's other form: it goes on %s%s", folder, engine.form, pruned)
    install_loss_scaler(engine, state.get("loss_scaler"))
    engine.steps_done = state["steps_done"]
    engine.attempts = state.get("attempts", [])
    engine.enter_phase()
