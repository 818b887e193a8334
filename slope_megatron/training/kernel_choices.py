"""The measured kernel choices as run state: the first rank of each stage decides, a resumed run takes them over."""

import functools
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.ops import choices, hints
from slope_megatron.storage import whole
from slope_megatron.training.together import from_every_rank

logger = logging.getLogger(__name__)


def file_of(run: Path) -> Path:
    """A stage's ranks meet the same products in the same order; other stages may meet others."""
    return run / f"kernel_choices_stage_{parallel_state.get_pipeline_model_parallel_rank()}.json"


def stage_group() -> dist.ProcessGroup:
    """The ranks of this pipeline stage, with all replicas of it."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def share(run: Path, *, resumed: bool, hinted: bool = False, own: Collection[tuple[int, int]] = ()) -> None:
    """Let the ranks of this stage agree on every choice, and take over those of the run that goes on.

    A table is taken over by all of them or by none: a rank that made a choice anew would wait for the others to do so.

    Args:
        hinted: measurements begin with what earlier runs on this machine have chosen.
        own: shapes (N, K) of experts' weights. Which numbers of tokens come to an expert, and when, differs by rank, so
            that a rank would wait for others that never meet the product: on products of these shapes, whosever weight
            it is, each rank decides for itself. The shapes are the same on all ranks, and so is what is left.
    """
    group = stage_group()
    first = dist.get_global_rank(group, 0)
    decides, alone = dist.get_rank() == first, group.size() == 1

    def broadcast(content: dict | None) -> Any:
        box: list = [content]
        dist.broadcast_object_list(box, src=first, group=group)
        return box[0]

    if resumed:
        path = file_of(run)
        saved = choices.read(path) if decides and os.path.exists(path) else None
        take_over(saved if alone else broadcast(saved), path, group)
    if hinted and decides and torch.cuda.is_available():
        hints.load(hints.file_of_machine())
    choices.agree_over(None if alone else broadcast, decides, functools.partial(is_common, own))


def is_common(own: Collection[tuple[int, int]], key: choices.Key) -> bool:
    """Whether a product is of none of these shapes, in either direction, or with adapters in its operand."""
    return not any(key.rows in shape and (key.columns in shape or key.augmented) for shape in own)


def take_over(saved: dict | None, path: Path, group: dist.ProcessGroup) -> None:
    """Adopt the table that the first rank has read where all ranks of the group run on the machine that made it.

    Args:
        saved: the same on every rank; None: there is none, or it is damaged.
        path: where it was read, for the log.
    """
    if saved is None:
        choices.clear()
        return
    from_here = from_every_rank(choices.is_from_here(saved, path), group)
    if all(from_here):
        choices.adopt(saved)
        return
    choices.clear()
    if from_here[group.rank()]:
        elsewhere = ", ".join(str(dist.get_global_rank(group, rank)) for rank, here in enumerate(from_here) if not here)
        logger.info(
            "%s was not measured on machines like those of ranks %s: products are measured anew", path, elsewhere
        )


def save(run: Path) -> None:
    """Write this stage's choices, once the first step has made them; nothing on machines without a choice.

    On a GPU they are hints for this machine's next runs, too. A disk that refuses them costs those their measuring, not
    this run its life.
    """
    group = stage_group()
    if dist.get_rank() != dist.get_global_rank(group, 0) or not choices.table():
        return
    write(file_of(run), choices.save, "a resumed run measures anew")
    if torch.cuda.is_available():
        write(hints.file_of_machine(), hints.save, "the next run searches anew")


def write(path: Path, save: Callable[[Path], None], cost: str) -> None:
    try:
        save(path)
    except OSError as error:
        logger.warning("%s could not be written (%s): %s", path, whole.reason(error), cost)
