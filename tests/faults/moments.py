"""Moments at which something goes wrong, drawn from a seed; and how each is brought about inside a rank."""

import dataclasses
import errno
import os
import random
import signal

KINDS = ("killed", "stopped", "truncated", "corrupted", "disk full")
# Parts of a step at which a rank can be struck, and points of a save.
PARTS = ("batch", "forward and backward", "gradients", "update", "validation", "checkpoint")
SAVE_POINTS = ("before the file", "in the file", "sealing", "index", "publish", "pointer", "prune")
RANK_0_POINTS = ("index", "publish", "pointer", "prune")
# Removing an old checkpoint needs no space.
WRITE_POINTS = SAVE_POINTS[:-1]
STEPS, SAVE_INTERVAL = 12, 2


@dataclasses.dataclass(frozen=True)
class Moment:
    """A fault: what, to which of two ranks, after how many steps, and at which point (of the step, or of a save)."""

    number: int
    kind: str
    rank: int
    step: int
    point: str
    tensor_parallel: int

    def __str__(self) -> str:
        layout = "TP2" if self.tensor_parallel == 2 else "DP2"
        return f"{self.number:2} {layout} rank {self.rank} {self.kind} after step {self.step}, {self.point}"


def draw(number: int, seed: int) -> Moment:
    """The `number`-th moment of a seed: kinds in turn, half of the strikes during a save."""
    chance = random.Random(f"{seed} {number}")
    kind = KINDS[number % len(KINDS)]
    rank = chance.randrange(2)
    tensor_parallel = 1 + number // len(KINDS) % 2
    # While one save is written, one before it is complete; two, if the newest is to be damaged.
    first = SAVE_INTERVAL * (3 if kind in ("truncated", "corrupted") else 2)
    saving = kind == "disk full" or chance.random() < 0.5
    if saving:
        point = chance.choice(WRITE_POINTS if kind == "disk full" else SAVE_POINTS)
        step = SAVE_INTERVAL * chance.randrange(first // SAVE_INTERVAL, STEPS // SAVE_INTERVAL)
        # Of two replicas the first one writes.
        alone = tensor_parallel == 1 and point in ("in the file", "sealing")
        rank = 0 if point in RANK_0_POINTS or alone else rank
    else:
        step = chance.randrange(first, STEPS - 1)
        point = "batch" if kind in ("truncated", "corrupted") else chance.choice(PARTS[:4])
    return Moment(number, kind, rank, step, point, tensor_parallel)


def strike(kind: str) -> None:
    """What happens to the process that calls it."""
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: Moment) -> None:
    """Let the fault happen in this process when its moment comes, once."""
    from torch.distributed.checkpoint import filesystem

    from slope_megatron.storage import tensors, whole
    from slope_megatron.training.checkpoint import store
    from slope_megatron.training.checkpoint.snapshot import Snapshot
    from slope_megatron.training.watch import rank_watch

    struck = []

    def once(condition: bool) -> None:
        if condition and not struck:
            struck.append(moment)
            strike(moment.kind)

    def before(holder, name: str, condition) -> None:
        original = getattr(holder, name)

        def wrapped(*arguments, **keywords):
            once(condition(*arguments))
            return original(*arguments, **keywords)

        setattr(holder, name, wrapped)

    folder = f"step_{moment.step:08d}"

    def in_save(path) -> bool:
        return folder in str(path)

    if moment.point in PARTS:
        before(rank_watch.RankWatch, "reach", lambda _, step, part: (step, part) == (moment.step, moment.point))
    elif moment.point == "before the file":
        before(Snapshot, "write", lambda _, path: in_save(path))
    elif moment.point == "in the file":
        before(filesystem, "_write_item", lambda _, stream, *rest: in_save(stream.name) and stream.tell() > 20_000)
    elif moment.point == "sealing":
        # The file is written and summed, and in no manifest yet.
        before(tensors._SummedStream, "entry", lambda stream: in_save(stream.name) and stream.name.endswith(".distcp"))
    elif moment.point == "index":
        before(Snapshot, "write_index", lambda _, path, parts: in_save(path))
    elif moment.point == "publish":
        before(os, "rename", lambda source, target: in_save(source) and in_save(target) and "old" not in str(target))
    elif moment.point == "pointer":
        before(whole, "write_text", lambda path, text: path.name == "latest" and in_save(text))
    else:
        before(store, "prune", lambda run, *rest: (run / "checkpoints" / folder).exists())
