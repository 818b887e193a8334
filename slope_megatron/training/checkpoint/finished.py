"""A run that has reached its last step is not done again: it is looked at, and nothing on the disk changes."""

from pathlib import Path

from slope_megatron.config import Config
from slope_megatron.config.json_file import read_json
from slope_megatron.training.checkpoint import recovery, run_folder, store
from slope_megatron.training.together import on_first_rank


class Finished(Exception):
    """There is nothing left to train; says so, and how to go on."""


def finished(config: Config) -> str | None:
    """What to say of a run to be resumed that is complete; None: it is not, or it is no such run. All ranks call it.

    Complete: an intact checkpoint of the last step, and a summary of that state.

    Raises:
        Agreed: the run is complete, and is one of other settings or other data.
    """
    folder = on_first_rank(lambda: last_checkpoint(config))
    # Read by all ranks, each its share: a checkpoint may have hundreds of GB.
    if folder is None or recovery.find_damage(folder):
        return None
    return on_first_rank(lambda: say_finished(config, folder))


def last_checkpoint(config: Config) -> Path | None:
    """The checkpoint of the last step of a run to be resumed, and with a summary; None: there is none."""
    run = Path(config.train.out)
    complete = store.complete_checkpoints(run) if run_folder.is_resumed(config) else []
    if not complete or store.step_of(complete[-1]) < config.train.last_step:
        return None
    folder = store.newest(run)
    step = store.step_of(folder)
    return folder if step >= config.train.last_step and has_summary(run, step) else None


def say_finished(config: Config, folder: Path) -> str:
    """
    Raises:
        ValueError: the run is one of other settings or other data.
    """
    run, step = Path(config.train.out), store.step_of(folder)
    store.check_state(folder, config)
    run_folder.check_same_data(run, config)
    if step < config.train.steps:
        way_on = f"to go on towards step {config.train.steps}, give a later --stop-at, or none"
    else:
        way_on = f"for more steps, start another run from it: --init-from {run}, with more --steps and another --out"
    return f"{run} was finished at step {step}: nothing was changed; {way_on}"


def has_summary(run: Path, step: int) -> bool:
    """Whether the run's summary is of this step, and all of it was saved."""
    try:
        summary = read_json(run / "summary.json", "it is written anew", holds=("steps", "unsaved"))
    except (OSError, ValueError):
        return False
    return summary["steps"] == step and not summary["unsaved"]
