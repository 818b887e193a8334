"""What a run took over all its attempts: each start that trains adds one, and checkpoints carry them on.

An attempt says from which step to which it trained, on what, and its seconds. Steps that were lost with a process and
done again count once, as in the state that they led to.
"""

import copy

import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.training.engine import Engine
from slope_megatron.training.telemetry import accounting

TOTALS = ("train_seconds", "wall_seconds", "timed_steps", "bad_steps", "skipped_steps")


def begin(engine: Engine) -> dict:
    """This start's attempt, before its first step."""
    return {
        "from_step": engine.steps_done,
        "to_step": engine.steps_done,
        "device": accounting.device_name(engine),
        "ranks": dist.get_world_size(),
        "tensor_parallel": engine.config.parallel.tensor_parallel,
        "pipeline_parallel": engine.config.parallel.pipeline_parallel,
        "data_parallel": parallel_state.get_data_parallel_world_size(),
        **dict.fromkeys(TOTALS, 0),
    }


def note_step(engine: Engine, attempt: dict, seconds: float, wall_seconds: float) -> None:
    """A step is done: the attempt is one of the engine's, and longer by it."""
    if attempt["timed_steps"] == 0:
        engine.attempts.append(attempt)
    attempt["to_step"] = engine.steps_done
    attempt["timed_steps"] += 1
    attempt["train_seconds"] += seconds
    attempt["wall_seconds"] = wall_seconds
    attempt["skipped_steps"] = engine.skipped_steps


def note_state(engine: Engine, attempt: dict) -> None:
    """Bytes of training state, of the form of the model that holds most so far; collective."""
    here = sum(accounting.state_bytes(engine)["model"].values())
    attempt["state_bytes"] = max(here, attempt.get("state_bytes", 0))


def wall_seconds(attempts: list[dict]) -> float:
    """From each attempt's start to its last step so far, added up."""
    return sum(attempt["wall_seconds"] for attempt in attempts)


def totals(attempts: list[dict], tokens_per_step: int) -> dict:
    """Sums over the attempts, the mean tokens/s of all timed steps (None: there are none), and the attempts."""
    sums = {name: sum(attempt[name] for attempt in attempts) for name in TOTALS}
    timed, seconds = sums.pop("timed_steps"), sums["train_seconds"]
    speed = timed * tokens_per_step / seconds if seconds else None
    return {**sums, "tokens_per_second": speed, "attempts": copy.deepcopy(attempts)}
