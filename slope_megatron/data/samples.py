"""The prepared splits as Megatron's datasets: which tokens are sample number i.

Megatron keeps the answer in index files, which rank 0 writes and all ranks map. Here they are written into a scratch
folder that is then renamed: a run killed meanwhile leaves no half-written index for the next one to trust.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from slope_megatron.config import Config, DataConfig
from slope_megatron.data import bert
from slope_megatron.data.blend import Blend, samples_needed
from slope_megatron.data.indexed import megatron_datasets
from slope_megatron.data.manifest import CACHE, dataset_name, fingerprint, load_manifest
from slope_megatron.data.scratch import scratch_beside
from slope_megatron.data.tokenizer import load_tokenizer
from slope_megatron.storage import folders, sums

logger = logging.getLogger(__name__)
SAMPLED = ("train", "valid")
MASKING = ("mlm_probability", "mlm_whole_words", "short_sequences")


def datasets_for(config: Config):
    """`build_datasets` of a run; refuses data that was prepared for another architecture."""
    data = config.data
    manifest = load_manifest(data.data)
    kind = manifest["kind"]
    if kind != config.model.architecture:
        raise ValueError(
            f"{data.data} was prepared with --kind {kind} and --architecture is {config.model.architecture}: prepare "
            f"the text with --kind {config.model.architecture}"
        )
    valid_samples = config.train.eval_samples
    if valid_samples and manifest["settings"]["valid_percent"] == 0:
        logger.warning("%s was prepared with --valid-percent 0: nothing is validated", data.data)
        valid_samples = 0
    held = (manifest["splits"]["valid"]["tokens"] - 1) // data.seq_length
    if kind == "gpt" and 0 < held < valid_samples:
        logger.warning(
            "--eval-samples is %d and the valid split has %d samples of %d tokens: some are validated more than once; "
            "give at most %d, or prepare more text",
            *(valid_samples, held, data.seq_length, held),
        )
    return build_datasets(
        data.data,
        seq_length=data.seq_length,
        train_samples=config.train.steps * data.global_batch_size,
        valid_samples=valid_samples,
        seed=config.train.seed,
        cache=data.cache,
        masking=data,
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """One source's samples of one split."""

    split: str
    prefix: Path
    tokens: int
    weight: float
    samples: int = 0


def build_datasets(
    folder: str | Path,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    cache: str | Path | None = None,
    masking: DataConfig | None = None,
):
    """The train and validation datasets of a prepared folder; to be called on all ranks alike.

    Item i is a dict: for a folder of kind gpt tokens, labels, position_ids [s] int64 and loss_mask [s] fp32; for kind
    bert see BertSamples. More samples than one epoch holds repeat the split in another order (bert: with other tokens
    hidden). Several sources are blended by their weights, or by their tokens where they have none. The order depends on
    all arguments but `cache`: a continued run must give the same ones. The index files go to `cache` (default: a folder
    in the prepared one), which all nodes must see.

    Args:
        masking: the MASKING fields of DataConfig, for kind bert (default: the defaults).

    Returns:
        (train, valid), each of at least as many items as asked for; None where none were asked for.
    Raises:
        ValueError: on every rank: no prepared folder, a split shorter than one sample, or an unusable cache folder.
    """
    folder = Path(folder).resolve()
    masking = masking or DataConfig()
    samples = dict(zip(SAMPLED, (train_samples, valid_samples), strict=True))
    manifest = load_manifest(folder)
    parts = {split: _parts(folder, manifest, split, count) for split, count in samples.items()}
    _check_lengths(folder, manifest["kind"], seq_length, parts, samples)
    config, dataset_class = _dataset_config(folder, manifest["kind"], seq_length, seed, masking)
    root = Path(cache).absolute() if cache is not None else folder / CACHE
    index = root / _cache_name(folder, seq_length, samples, seed, masking if manifest["kind"] == "bert" else None)
    every = [part for split in SAMPLED for part in parts[split]]
    _write_index_once(index, lambda folder: [_dataset(dataset_class, config, part, folder) for part in every])

    def whole(split: str):
        datasets = [_dataset(dataset_class, config, part, index) for part in parts[split]]
        if manifest["kind"] == "bert":
            datasets = [bert.BertSamples(dataset) for dataset in datasets]
        if len(datasets) < 2:
            return datasets[0] if datasets else None
        return Blend(datasets, [part.weight for part in parts[split]], samples[split])

    train, valid = map(whole, SAMPLED)
    return train, valid


def _parts(folder: Path, manifest: dict, split: str, count: int) -> list[_Part]:
    """What each source gives to `count` samples of a split; nothing for none."""
    if count < 0:
        raise ValueError(f"{count} {split} samples were asked for: it must be 0 (none) or more")
    sources = manifest["sources"]
    parts = []
    for number, source in enumerate(sources):
        tokens = source["splits"][split]["tokens"]
        weight = source["weight"] if source["weight"] is not None else tokens
        if count and (weight or len(sources) == 1):
            parts.append(_Part(split, folder / dataset_name(split, number, len(sources)), tokens, weight or 1))
    counts = samples_needed([part.weight for part in parts], count)
    # A source of a small share may give nothing to a few samples, and Megatron has no datasets of none.
    return [dataclasses.replace(part, samples=max(1, count)) for part, count in zip(parts, counts, strict=True)]


def _check_lengths(folder: Path, kind: str, seq_length: int, parts: dict, samples: dict[str, int]) -> None:
    if kind == "bert" and seq_length < bert.SHORTEST:
        raise ValueError(f"--seq-length is {seq_length}: BERT's pairs need at least {bert.SHORTEST}")
    for split in SAMPLED:
        if samples[split] and not parts[split]:
            raise ValueError(f"the {split} split of {folder} has no text: prepare more, or a larger --{split}-percent")
        for part in parts[split]:
            name = part.prefix.name
            # Labels are the next tokens: one token more than the sample is long.
            if kind == "gpt" and part.tokens < seq_length + 1:
                without = ", or --eval-samples 0" if split == "valid" else ""
                raise ValueError(
                    f"the {name} split of {folder} has {part.tokens} tokens: one sample of --seq-length {seq_length} "
                    f"needs {seq_length + 1}; take a shorter --seq-length, or prepare more text{without}"
                )
            if kind == "bert" and not bert.usable_documents(part.prefix):
                raise ValueError(
                    f"the {name} split of {folder} has no document of two sentences: BERT's pairs need one; prepare "
                    "other text, or more of it"
                )


def _dataset_config(folder: Path, kind: str, seq_length: int, seed: int, masking: DataConfig):
    """Megatron's settings, and its class of dataset."""
    tokenizer = load_tokenizer(folder)
    if kind == "bert":
        dataset_class = megatron_datasets("bert_dataset").BERTMaskedWordPieceDataset
        return bert.bert_config(tokenizer, seq_length, seed, masking), dataset_class
    gpt = megatron_datasets("gpt_dataset")
    config = gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[None, None, None],
        tokenizer=tokenizer,
        # Documents of one sample see each other, as in GPT pretraining; the mask is the causal one, made in attention.
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return config, gpt.GPTDataset


def _dataset(dataset_class, config, part: _Part, index: Path):
    """Megatron's dataset of one part; its index is read from the folder `index`, or written there."""
    from megatron.core.datasets.utils import Split

    config.path_to_cache = str(index)
    tokens = dataset_class.build_low_level_dataset(str(part.prefix), config)
    documents = np.arange(dataset_class.numel_low_level_dataset(tokens), dtype=np.int32)
    return dataset_class(tokens, str(part.prefix), documents, part.samples, Split[part.split], config)


def _cache_name(folder: Path, seq_length: int, samples: dict[str, int], seed: int, masking: DataConfig | None) -> str:
    """Everything that the index depends on. The path is Megatron's wish: it is part of its file names."""
    parts = [str(folder), fingerprint(folder), seq_length, samples, seed]
    parts += [getattr(masking, name) for name in MASKING] if masking else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write_index_once(index: Path, build: Callable[[Path], object]) -> None:
    """Rank 0 writes the index folder unless it is whole; all ranks look at it, and all raise what one of them found."""
    alone = not dist.is_initialized()
    error = None
    if alone or dist.get_rank() == 0:
        error = _write_index(index, build)
    if not alone:
        dist.barrier()
    if error is None and not index.is_dir():
        error = (
            f"rank {dist.get_rank()} does not see the index folder {index} that rank 0 wrote: put the data on a file "
            "system that all nodes share"
        )
    if error is None and (found := _unreadable_array(index)):
        error = f"the data's index {index} is damaged: its file {found}; remove that folder, and it is built anew"
    errors = [error]
    if not alone:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    if first := next(filter(None, errors), None):
        raise ValueError(first)


def _write_index(index: Path, build: Callable[[Path], object]) -> str | None:
    """Returns what went wrong, if anything."""
    if index.is_dir():
        damage = _index_damage(index)
        if damage is None:
            return None
        logger.warning("the data's index %s is damaged (its file %s): it is built anew", index, damage)
    try:
        with scratch_beside(index) as scratch:
            finished = scratch / "index"
            finished.mkdir()
            build(finished)
            sums.write_manifest(finished)
            folders.put(finished, index, sums.FOLDER)
    except (OSError, ValueError) as failure:
        # Another run may have been faster; its index is the same.
        if index.is_dir() and _index_damage(index) is None:
            return None
        return f"the data's index cannot be written to {index.parent} ({failure}): give a cache folder you may write to"
    return None


def _index_damage(index: Path) -> str | None:
    """The first file of an index that is not what was written, and how it differs."""
    if not sums.manifest_of(index):
        sums.note_absence(index)
        return _unreadable_array(index)
    return sums.find_damage(index) or _unreadable_array(index)


def _unreadable_array(index: Path) -> str | None:
    """The first file that is no plain array: Megatron would unpickle it, which may execute what it holds."""
    for path in sorted(index.glob("*.npy")):
        try:
            plain = isinstance(np.load(path, mmap_mode="r", allow_pickle=False), np.ndarray)
        except (OSError, ValueError, EOFError):
            plain = False
        if not plain:
            return f"{path.name} is no array"
    return None
