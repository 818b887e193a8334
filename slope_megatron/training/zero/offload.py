"""Optimizer state that DeepSpeed keeps on an NVMe disk (ZeRO-3): here only while somebody looks at it.

DeepSpeed swaps a sub-group at a time: its masters and moments lie in files, and the tensors that stand for them are
empty. Groups under a megabyte or so stay in host memory. The private names are DeepSpeed 0.19's; its public accessors
swap a whole sub-group in for each parameter, which a checkpoint of many parameters cannot afford.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from slope_megatron.config import Config

# Parameter, gradient and both moments.
BUFFERS = 4
NO_FOLDER = "without --offload-path, a folder on the NVMe disk"


def unsupported(config: Config) -> str | None:
    """Why this rank cannot swap to NVMe; None: it can. Builds DeepSpeed's async_io, once a machine."""
    if config.parallel.zero_stage != 3:
        return f"with --zero-stage {config.parallel.zero_stage}: DeepSpeed swaps to NVMe under stage 3 only"
    if config.optimizer.optimizer != "adamw":
        return f"with --optimizer {config.optimizer.optimizer}, which reads the state of all groups at once"
    folder = config.parallel.offload_path
    if not folder:
        return NO_FOLDER
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"and --offload-path {folder} cannot be written ({error.strerror})"
    if not AsyncIOBuilder().is_compatible():
        return "and DeepSpeed's async_io cannot be built here (it needs libaio and its headers)"
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # compilers fail in many ways
        return f"and DeepSpeed's async_io does not build ({str(error).splitlines()[0] if str(error) else error!r})"
    return None


def settings(config: Config) -> dict:
    """DeepSpeed's `offload_optimizer`.

    Raises:
        ValueError: there is no folder.
    """
    if config.parallel.offload_path is None:
        raise ValueError(f"--offload-optimizer is nvme {NO_FOLDER}; use --offload-optimizer cpu")
    return {
        "device": "nvme",
        "nvme_path": os.path.abspath(config.parallel.offload_path),
        "pin_memory": torch.cuda.is_available(),
        "buffer_count": BUFFERS,
    }


def swaps(optimizer, elements: int) -> bool:
    """Whether DeepSpeed's optimizer keeps a partition of so many elements on the disk between two uses."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    return swapper is not None and swapper.is_swappable_tensor(None, elements)


@contextlib.contextmanager
def in_memory(optimizer, index: int, *, write: bool = False) -> Iterator[None]:
    """Within this context the masters and moments of a partition are there; with `write` they go back as they are."""
    # It may not be here to be counted; below stage 3 nothing is swapped.
    counts = getattr(optimizer, "fp16_partitioned_groups_flat_numel", None)
    if not counts or not swaps(optimizer, int(counts[index])):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(index)
    yield
    if write:
        optimizer._optimizer_states_and_gradient_swap_out(index)
    else:
        optimizer._release_swap_buffers(index)
