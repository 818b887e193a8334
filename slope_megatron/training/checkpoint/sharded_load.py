"""megatron-core's loading of sharded tensors, by a reader that checks what it reads and executes none of it."""

import pickle
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint.api import CheckpointException

from slope_megatron.storage import whole
from slope_megatron.storage.metadata import Refused
from slope_megatron.storage.tensors import CheckedReader, first_cause
from slope_megatron.training import together


class CheckedStrategy(megatron_torch.TorchDistLoadShardedStrategy):
    """megatron-core's own, with our reader."""

    def __init__(self, reader: CheckedReader):
        super().__init__()
        self.reader = reader

    def load(self, sharded_state_dict, checkpoint_dir):
        # While it loads, the reader that it makes is ours; megatron-core 0.16 cannot be given one.
        original = megatron_torch._get_filesystem_reader
        megatron_torch._get_filesystem_reader = lambda *_, **__: self.reader
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        finally:
            megatron_torch._get_filesystem_reader = original


class PlainCommonStrategy(TorchCommonLoadStrategy):
    """What is no tensor: plain data only, whatever torch's default is; read when this is made.

    Raises:
        Refused: it is not plain data; nothing of it was executed.
        OSError, RuntimeError: it cannot be read.
    """

    def __init__(self, folder: Path):
        path = folder / COMMON_STATE_FNAME
        try:
            self.common = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise Refused(
                f"{path} is no plain data ({str(error).splitlines()[0]}): nothing was executed; use a checkpoint whose "
                "origin you trust"
            ) from None

    def load_common(self, checkpoint_dir):
        return self.common


def open_strategies(folder: Path, way_out: str) -> dict:
    """What megatron-core reads a checkpoint by; what is small is read already.

    Raises:
        Damaged, Refused: it cannot be read, or must not be.
    """
    reader = CheckedReader(folder, way_out, whole_files=False)
    reader.read_metadata()
    try:
        common = PlainCommonStrategy(folder)
    except (OSError, RuntimeError, EOFError) as error:
        raise reader.damaged(f"{COMMON_STATE_FNAME} cannot be read ({whole.reason(error)})") from None
    return {"sharded_strategy": CheckedStrategy(reader), "common_strategy": common}


def load_sharded(state: dict, folder: Path, way_out: str) -> dict:
    """Fill sharded tensors from a checkpoint, at any layout; all ranks call it.

    Args:
        way_out: what to do about a checkpoint that is damaged.
    Raises:
        Damaged, Refused: on every rank, what the first of them met that could not read its part.
    """
    # Before the first collective: a rank that fails alone must not leave the others waiting.
    strategies = together.agreed(lambda: open_strategies(folder, way_out))
    try:
        return dist_checkpointing.load(state, str(folder), **strategies)
    except CheckpointException as error:
        raise first_cause(error) from None
