"""`--load` (or `--pretrained-checkpoint`) of a dense Megatron-LM model under `--slope`: pruned as it is read.

A new run starts from it, at step 0 and with a new optimizer, at any layout. Imported where the script is hooked.
"""

import argparse
import functools
import logging
from pathlib import Path

import torch
import torch.distributed as dist

from slope_megatron.config import SlopeConfig
from slope_megatron.config.fields import destination
from slope_megatron.integrations.megatron_lm import plugin
from slope_megatron.integrations.megatron_lm.adapters import unwrapped
from slope_megatron.models.canonical import shards
from slope_megatron.models.dense import DERIVED, fill_dense
from slope_megatron.models.dense_checkpoint import MegatronCheckpoint
from slope_megatron.storage import metadata
from slope_megatron.storage.tensors import CheckedReader

logger = logging.getLogger(__name__)
LATEST = "latest_checkpointed_iteration.txt"


def with_dense_start(load_checkpoint):
    """The checkpoint; one of a dense model is pruned, and training begins."""

    @functools.wraps(load_checkpoint)
    def load(ddp_model, optimizer, *positional, **keywords):
        args, slope = plugin.settings()
        folder = dense_folder(args) if slope.enabled else None
        if folder is None:
            return load_checkpoint(ddp_model, optimizer, *positional, **keywords)
        pattern = chosen_pattern(args, slope)
        prune(ddp_model, MegatronCheckpoint(folder, args.padded_vocab_size), args.seed, pattern)
        if optimizer is not None:
            optimizer.reload_model_params()
        logger.warning(
            "%s holds a dense model: its weights are pruned, %s, and training begins at step 0",
            folder,
            "the largest stay (--slope-pattern magnitude)"
            if pattern == "magnitude"
            else f"by --slope-pattern {pattern}",
        )
        return 0, 0

    return load


def chosen_pattern(args: argparse.Namespace, slope: SlopeConfig) -> str:
    """`--slope-pattern` where it was given; trained weights are not pruned at random by default."""
    return slope.pattern if destination(SlopeConfig, "pattern") in vars(args) else "magnitude"


def dense_folder(args: argparse.Namespace) -> Path | None:
    """The iteration that upstream would load, if it holds a dense model in the torch_dist format."""
    for named in (args.load, getattr(args, "pretrained_checkpoint", None)):
        latest = Path(named or "") / LATEST
        if not named or not latest.is_file():
            continue
        step = str(getattr(args, "ckpt_step", None) or latest.read_text().strip())
        folder = latest.parent / ("release" if step == "release" else f"iter_{int(step):07d}")
        if not (folder / metadata.NAME).is_file():
            return None
        names = CheckedReader(folder).read_metadata().state_dict_metadata
        return None if any(name.endswith(".weight_pattern") for name in names) else folder
    return None


@torch.no_grad()
def prune(chunks, source: MegatronCheckpoint, seed: int, pattern: str) -> None:
    """Give the chunks of this rank the weights of a dense model; all ranks call it.

    Raises:
        ValueError: a tensor is missing, has another shape, or belongs to no part of the model.
    """
    models = [unwrapped(chunk) for chunk in chunks]
    own = {shard.name for model in models for shard in shards(model)}
    every: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(every, own)
    unknown = sorted(set(source) - set().union(*every))
    if unknown:
        raise ValueError(
            f"{source.folder} has {len(unknown)} tensors with no place in this model, {unknown[0]} for one: give the "
            "flags of the model that was saved"
        )
    made = (*(f".{leaf}" for leaf in DERIVED), ".adapter_l", ".adapter_r")
    missing = sorted(name for name in own - set(source) if not name.endswith(made))
    if missing:
        raise ValueError(f"{source.folder} has no {missing[0]}: give the flags of the model that was saved")
    for model in models:
        fill_dense(model, source, seed, pattern)
