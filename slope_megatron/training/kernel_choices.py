"""The measured kernel choices as run state: the first rank of each stage decides, a resumed run takes them over."""

import logging
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.ops import choices
from slope_megatron.training import files

logger = logging.getLogger(__name__)


def file_of(run: Path) -> Path:
    """A stage's ranks meet the same products in the same order; other stages may meet others."""
    return run / f"kernel_choices_stage_{parallel_state.get_pipeline_model_parallel_rank()}.json"


def share(run: Path, *, resumed: bool) -> None:
    """Let the ranks of this stage agree on every choice, and take over those of the run that goes on."""
    if resumed and file_of(run).is_file():
        choices.load(file_of(run))
    group = parallel_state.get_tensor_and_data_parallel_group()
    first = dist.get_global_rank(group, 0)

    def broadcast(choice: dict | None) -> dict:
        box: list = [choice]
        dist.broadcast_object_list(box, src=first, group=group)
        return box[0]

    choices.agree_over(broadcast if group.size() > 1 else None, decides=dist.get_rank() == first)


def save(run: Path) -> None:
    """Write this stage's choices, once the first step has made them; nothing on machines without a choice.

    A disk that refuses them costs a resumed run their measuring, not this run its life.
    """
    group = parallel_state.get_tensor_and_data_parallel_group()
    if dist.get_rank() == dist.get_global_rank(group, 0) and not choices.is_empty():
        try:
            choices.save(file_of(run))
        except OSError as error:
            logger.warning(
                "%s could not be written (%s): a resumed run measures anew", file_of(run), files.reason(error)
            )
