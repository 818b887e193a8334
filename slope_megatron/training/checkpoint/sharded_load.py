"""megatron-core's loading of sharded tensors, by a reader that checks what it reads and executes none of it."""

import pickle
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.api import CheckpointException

from slope_megatron.storage import whole
from slope_megatron.storage.metadata import Refused
from slope_megatron.storage.tensors import CheckedReader, first_cause
from slope_megatron.training import together

COMMON = "common.pt"


class CheckedStrategy(megatron_torch.TorchDistLoadShardedStrategy):
    """megatron-core's own, with our reader."""

    def __init__(self, reader: CheckedReader):
        super().__init__()
        self.reader = reader

    def load(self, sharded_state_dict, checkpoint_dir):
        """
        Raises:
            Damaged, Refused: a part cannot be read, or must not be; from core 0.18 on, only where that is met.
        """
        # While it loads, the reader that it makes is ours: no megatron-core can be given one.
        original = megatron_torch._get_filesystem_reader
        megatron_torch._get_filesystem_reader = lambda *_, **__: self.reader
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        except CheckpointException as error:
            raise first_cause(error) from None
        finally:
            megatron_torch._get_filesystem_reader = original


def read_common(reader: CheckedReader, folder: Path) -> dict:
    """What is no tensor: plain data only, whatever torch's default is; the reader has read its metadata then, too.

    Raises:
        Refused: it is not plain data; nothing of it was executed.
        Damaged: it cannot be read.
    """
    reader.read_metadata()
    path = folder / COMMON
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Refused(
            f"{path} is no plain data ({str(error).splitlines()[0]}): nothing was executed; use a checkpoint whose "
            "origin you trust"
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        raise reader.damaged(f"{COMMON} cannot be read ({whole.reason(error)})") from None


def load_sharded(state: dict, folder: Path, way_out: str) -> dict:
    """Fill sharded tensors from a checkpoint, at any layout; all ranks call it.

    The steps of megatron-core's `dist_checkpointing.load`, which takes the reader of what is no tensor from its caller
    in 0.16 and from nobody later.

    Args:
        way_out: what to do about a checkpoint that is damaged.
    Raises:
        Damaged, Refused: on every rank, what the first of them met that could not read its part.
    """
    reader = CheckedReader(folder, way_out, whole_files=False)
    # Before the first collective: a rank that fails alone must not leave the others waiting.
    loaded = together.agreed(lambda: read_common(reader, folder))
    state, nonpersistent, factories = load_preprocess(state)
    merge(loaded, nonpersistent)
    sharded, _ = extract_sharded_base(state)
    validate_sharding_integrity(determine_global_metadata(sharded)[1])
    merge(loaded, together.agreed(lambda: CheckedStrategy(reader).load(sharded, folder)))
    return apply_factory_merges(loaded, factories)
