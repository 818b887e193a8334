"""The prepared splits as Megatron's GPTDataset: which tokens are sample number i.

Megatron keeps the answer in index files, which rank 0 writes and all ranks map. Here they are written into a scratch
folder that is then renamed: a run killed meanwhile leaves no half-written index for the next one to trust.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch.distributed as dist

from slope_megatron.data.manifest import CACHE, fingerprint, load_manifest
from slope_megatron.data.scratch import scratch_beside
from slope_megatron.data.tokenizer import load_tokenizer


def build_datasets(
    folder: str | Path,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    cache: str | Path | None = None,
):
    """The train and validation datasets of a prepared folder; to be called on all ranks alike.

    Item i is a dict of tokens, labels, position_ids [s] int64 and loss_mask [s] fp32. More samples than one epoch
    holds repeat the split in another order. The order depends on all arguments but `cache`: a continued run must
    give the same ones. The index files go to `cache` (default: a folder in the prepared one), which all nodes must see.

    Returns:
        (train, valid), each of at least as many items as asked for; None where none were asked for.
    Raises:
        ValueError: on every rank: no prepared folder, a split shorter than one sample, or an unusable cache folder.
    """
    folder = Path(folder).resolve()
    samples = {"train": train_samples, "valid": valid_samples}
    splits = load_manifest(folder)["splits"]
    for name, count in samples.items():
        _check_length(folder, name, splits[name]["tokens"], seq_length, count)
    config = _dataset_config(folder, seq_length, samples, seed)
    root = Path(cache).absolute() if cache is not None else folder / CACHE
    place = root / _cache_name(folder, seq_length, samples, seed)
    _write_index_once(place, config, samples)
    config.path_to_cache = str(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [train_samples, valid_samples, 0], lambda: True, config
    ).build()
    return train, valid


def _check_length(folder: Path, name: str, tokens: int, seq_length: int, count: int) -> None:
    if count < 0:
        raise ValueError(f"{count} {name} samples were asked for: it must be 0 (none) or more")
    # Labels are the next tokens: one token more than the sample is long.
    if count and tokens < seq_length + 1:
        raise ValueError(
            f"the {name} split of {folder} has {tokens} tokens: one sample of --seq-length {seq_length} needs "
            f"{seq_length + 1}; take a shorter --seq-length, or prepare more text"
        )


def _dataset_config(folder: Path, seq_length: int, samples: dict[str, int], seed: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    blend = [([str(folder / name)], None) if count else None for name, count in samples.items()]
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[*blend, None],
        tokenizer=load_tokenizer(folder / "tokenizer.model"),
        # Documents of one sample see each other, as in GPT pretraining; the mask is the causal one, made in attention.
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )


def _cache_name(folder: Path, seq_length: int, samples: dict[str, int], seed: int) -> str:
    """Everything that the index depends on. The path is Megatron's wish: it is part of its file names."""
    parts = [str(folder), fingerprint(folder), seq_length, samples, seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write_index_once(place: Path, config, samples: dict[str, int]) -> None:
    """Rank 0 writes the index folder unless it is there; then every rank looks whether it sees it.

    Raises:
        ValueError: on every rank, if one of them failed: a rank that raised alone would leave the others waiting.
    """
    alone = not dist.is_initialized()
    error = None
    if alone or dist.get_rank() == 0:
        error = _write_index(place, config, samples)
    if not alone:
        dist.barrier()
    if error is None and not place.is_dir():
        error = (
            f"rank {dist.get_rank()} does not see the index folder {place} that rank 0 wrote: put the data on a file "
            "system that all nodes share"
        )
    errors = [error]
    if not alone:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    if first := next(filter(None, errors), None):
        raise ValueError(first)


def _write_index(place: Path, config, samples: dict[str, int]) -> str | None:
    """Returns what went wrong, if anything."""
    if place.is_dir():
        return None
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    try:
        with scratch_beside(place) as scratch:
            finished = scratch / "index"
            finished.mkdir()
            config.path_to_cache = str(finished)
            for name, count in samples.items():
                if count:
                    prefix = config.blend_per_split[Split[name].value][0][0]
                    tokens = GPTDataset.build_low_level_dataset(prefix, config)
                    documents = np.arange(GPTDataset.numel_low_level_dataset(tokens), dtype=np.int32)
                    GPTDataset(tokens, prefix, documents, count, Split[name], config)
            os.rename(finished, place)
    except (OSError, ValueError) as failure:
        # Another run may have been faster; its index is the same.
        if place.is_dir():
            return None
        return f"the data's index cannot be written to {place.parent} ({failure}): give a cache folder you may write to"
    return None
