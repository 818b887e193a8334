"""Two ranks of a small run, forked from the test server: started, struck, started again."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import time
from pathlib import Path

from faults.moments import SAVE_INTERVAL, STEPS, Moment, arm

from helpers.distributed import Meeting, fork_server, new_meeting

WORLD = 2
# For runs that are to hang; a busy machine may take this long for a step of the others.
HANG_TIMEOUT = 4.0
PATIENCE = 300.0
NUMBERS = itertools.count()


def settings(data: Path, run: Path, tensor_parallel: int, *, hang_timeout: float = 60.0, **train):
    """A run of 12 steps, saved every second: adapters join at step 9, the column pattern changes at 5 and 10."""
    from slope_megatron.config import (
        Config,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        SlopeConfig,
        TrainConfig,
        WatchConfig,
    )

    return Config(
        slope=SlopeConfig(adapter_rank=4, lazy_fraction=0.25, backward_mask_interval=5),
        model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_multiple=48, dropout=0.1),
        parallel=ParallelConfig(tensor_parallel=tensor_parallel),
        data=DataConfig(data=str(data), seq_length=16, micro_batch_size=2, global_batch_size=4),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        train=TrainConfig(
            out=str(run),
            steps=STEPS,
            save_interval=SAVE_INTERVAL,
            eval_interval=5,
            eval_samples=4,
            log_interval=1,
            **train,
        ),
        watch=WatchConfig(hang_timeout=hang_timeout),
    )


def play(rank: int, config, folder: Path, meeting: Meeting, moment: Moment | None, prepare_rank) -> None:
    """One rank of a run, in a process of its own; leaves with the program's exit code."""
    import sys
    import traceback

    import torch.distributed as dist

    os.setpgrp()  # whatever this rank starts is of its group
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        from slope_megatron.cli import BAD_INPUT, set_up_logging
        from slope_megatron.cli import pretrain as program

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
        set_up_logging(False)
        dist.init_process_group("gloo", store=meeting.store(), rank=rank, world_size=WORLD)
        if moment is not None and moment.rank == rank:
            arm(moment)
        if prepare_rank is not None:
            prepare_rank(rank)
        code = program.train(config, {})
    except ValueError as error:
        # As the program's main function, but for every rank.
        print(f"slope: error: {error}", file=sys.stderr, flush=True)
        code = BAD_INPUT
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: each rank's exit code (negative: the signal), what they said, and the seconds it took."""

    codes: list[int]
    said: str
    seconds: float


def start(config, folder: Path, moment: Moment | None = None, prepare_rank=None) -> Ended:
    """Run both ranks to their end.

    Args:
        folder: for logs.
        prepare_rank: a function of the rank, importable by name, called in each rank before the run.
    """
    logs = folder / f"attempt_{next(NUMBERS)}"
    logs.mkdir(parents=True)
    context, meeting = fork_server(), new_meeting()
    begun = time.monotonic()
    ranks = [
        context.Process(target=play, args=(rank, config, logs, meeting, moment, prepare_rank), daemon=True)
        for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(max(0.0, PATIENCE - (time.monotonic() - begun)))
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    said = "".join((logs / f"rank_{rank}.log").read_text(errors="replace") for rank in range(WORLD))
    assert not late, f"the ranks had not ended after {PATIENCE} s:\n{said}"
    assert not [process.pid for process in ranks if group_is_alive(process.pid)], "a rank left a process behind"
    return Ended([process.exitcode for process in ranks], said, time.monotonic() - begun)


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def losses(run: Path) -> dict[int, float]:
    """Losses by step; steps done twice must not differ, which the writer sees to by dropping the first."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text().split("\n")[:-1]:
        content = json.loads(line)
        if "loss" in content:
            found[content["step"]] = content["loss"]
    return found


def damage(folder: Path, kind: str, seed: str) -> str:
    """Cut the largest file of a checkpoint short, or turn one bit of it over; returns the file's name."""
    victim = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    offset = random.Random(seed).randrange(len(content))
    if kind == "truncated":
        victim.write_bytes(content[:offset])
    else:
        content[offset] ^= 1 << offset % 8
        victim.write_bytes(content)
    return victim.name


def copy_of(run: Path, to: Path) -> Path:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(to)
    return shutil.copytree(run, to)
