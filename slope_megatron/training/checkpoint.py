"""Checkpoints: one form, by canonical names, that does not know the layout that wrote it.

    RUN/checkpoints/step_00000500/   megatron-core distributed checkpoint: values, patterns, adapters, masters, moments
                    .../state.json   configuration, steps done, optimizer step counters
                    .../manifest.json  size and SHA-256 of every file
    RUN/checkpoints/latest           name of the newest complete one, written last

A checkpoint appears by one rename when all of it is on disk. Random states and the data position are functions of the
step, so nothing of them is saved.
"""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from slope_megatron.config import Config
from slope_megatron.models.canonical import sharded_state_dict
from slope_megatron.models.fill import pruned_modules
from slope_megatron.training import files
from slope_megatron.training.engine import Engine
from slope_megatron.training.optimizer import model_parameters

logger = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
FORMAT = 1


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


# -- the engine's state as sharded tensors -----------------------------------------------------------------------------


def link_optimizer_state(engine: Engine) -> None:
    """Let DeepSpeed's per-parameter accessors see the optimizer state, creating it (zeros) before the first step.

    The two private names are DeepSpeed 0.19's: it links once and never again, and a load needs it again.
    """
    base = engine.optimizer.optimizer
    for group in base.param_groups:
        for partition in group["params"]:
            state = base.state[partition]
            if not state:
                state["step"] = torch.tensor(0.0)
                state.update({name: torch.zeros_like(partition) for name in MOMENTS})
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def sharded_engine_state(engine: Engine, *, filled: bool) -> dict:
    """Model and optimizer as sharded tensors; `filled` with the present state (to save) or empty (to load into).

    Collective over the data-parallel ranks when filled: each parameter's fp32 state is put together in turn.
    """
    model_state = sharded_state_dict(engine.model)
    state = {"model": model_state, "fp32": {}, **{name: {} for name in MOMENTS}}
    for name, parameter in model_parameters(engine.model):
        full = {}
        if filled:
            full["fp32"] = safe_get_full_fp32_param(parameter)
            full.update({moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS})
        for kind in ("fp32", *MOMENTS):
            tensor = full[kind].detach() if filled else torch.empty(parameter.shape, dtype=torch.float32)
            state[kind][name] = make_sharded_optimizer_tensor(model_state[name], tensor, f"optimizer.{kind}")
    return state


def optimizer_steps(engine: Engine) -> dict[str, float]:
    """Adam's step counter of each parameter group (the adapters' starts when they join); all ranks call it.

    A pipeline stage may lack a group, so every rank's are put together.
    """
    base = engine.optimizer.optimizer
    here = {group["name"]: float(base.state[group["params"][0]]["step"]) for group in base.param_groups}
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return {name: step for steps in everywhere for name, step in steps.items()}


def install_engine_state(engine: Engine, state: dict, steps: dict[str, float]) -> None:
    """Put loaded state into the model, the fp32 partitions and the moments."""
    engine.model.load_state_dict(state["model"], strict=False)
    for name, parameter in model_parameters(engine.model):
        safe_set_full_fp32_param(parameter, state["fp32"][name])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[moment][name], moment)
    base = engine.optimizer.optimizer
    for group in base.param_groups:
        for partition in group["params"]:
            base.state[partition]["step"].fill_(steps[group["name"]])
    engine.optimizer.update_lp_params()
    for module in pruned_modules(engine.model):
        module.drop_operands()


# -- save --------------------------------------------------------------------------------------------------------------


def save(engine: Engine, run: Path) -> Path:
    """Write a checkpoint of the present step; all ranks call it. Keeps the newest `keep_checkpoints`."""
    target = folder_of(run, engine.steps_done)
    partial = target.with_name(f"{target.name}.partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    link_optimizer_state(engine)
    steps = optimizer_steps(engine)
    dist_checkpointing.save(sharded_engine_state(engine, filled=True), str(partial))
    if first:
        state = {
            "format": FORMAT,
            "steps_done": engine.steps_done,
            "optimizer_steps": steps,
            "config": engine.config.to_dict(),
        }
        files.write_json(partial / "state.json", state)
        publish(partial, target)
        prune(run, engine.config.train.keep_checkpoints)
    dist.barrier()
    return target


def publish(partial: Path, target: Path) -> None:
    """Seal a complete folder with its manifest, give it its name, and only then point `latest` at it."""
    names = sorted(path.name for path in partial.iterdir())
    manifest = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": files.sha256(partial / name)} for name in names
    }
    files.write_json(partial / "manifest.json", manifest)
    files.sync_folder(partial)
    if target.exists():
        shutil.rmtree(target)
    os.rename(partial, target)
    files.sync_folder(target.parent)
    files.write_text(target.parent / "latest", f"{target.name}\n")


def complete_checkpoints(run: Path) -> list[Path]:
    """Sealed checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step_*/manifest.json")
    return sorted(path.parent for path in found if not path.parent.name.endswith(".partial"))


def prune(run: Path, keep: int) -> None:
    for folder in complete_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)


# -- load --------------------------------------------------------------------------------------------------------------


def newest(run: Path) -> Path:
    """The checkpoint to go on from: the one `latest` names, or the newest there is when that folder is gone.

    Raises:
        ValueError: there is none.
    """
    complete = complete_checkpoints(run)
    if not complete:
        raise ValueError(f"{run} has no complete checkpoint to resume from: start anew with --overwrite")
    pointer = run / "checkpoints" / "latest"
    named = run / "checkpoints" / pointer.read_text().strip() if pointer.is_file() else complete[-1]
    if named not in complete:
        logger.warning("%s is gone: resuming from %s", named.name, complete[-1].name)
        return complete[-1]
    return named


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        ValueError: a file is missing or differs; names it, and the checkpoint to use instead.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != expected["bytes"]:
            problem = f"has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif files.sha256(path) != expected["sha256"]:
            problem = "has another checksum"
        else:
            continue
        others = [other.name for other in complete_checkpoints(folder.parent.parent) if other != folder]
        way_out = f"remove {folder} to resume from {others[-1]}" if others else "start anew with --overwrite"
        raise ValueError(f"checkpoint {folder} is corrupt: its file {name} {problem}; {way_out}")


def read_state(folder: Path, config: Config) -> dict:
    """`state.json` of a verified checkpoint that belongs to `config`.

    Raises:
        ValueError: corrupt, of another format, or of another model or schedule.
    """
    verify(folder)
    state = json.loads((folder / "state.json").read_text())
    if state["format"] != FORMAT:
        raise ValueError(
            f"checkpoint {folder} has format {state['format']} and this version reads {FORMAT}: use the "
            "version that wrote it"
        )
    differences = config.differences(state["config"])
    if differences:
        raise ValueError(
            f"checkpoint {folder} is of another run ({'; '.join(differences)}): give the same settings, "
            "or another --out"
        )
    return state


def load(engine: Engine, folder: Path) -> None:
    """Restore an engine built from the same configuration; all ranks call it. Rank 0 has called `read_state`."""
    state = json.loads((folder / "state.json").read_text())
    link_optimizer_state(engine)
    sharded = sharded_engine_state(engine, filled=False)
    loaded = dist_checkpointing.load(sharded, str(folder))
    install_engine_state(engine, loaded, state["optimizer_steps"])
    engine.steps_done = state["steps_done"]
    engine.enter_phase()
