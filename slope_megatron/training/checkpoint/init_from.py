"""`--init-from`: a new run starts from the weights of another one, dense (then pruned) or packed (then as they are)."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from slope_megatron.config import Config, SlopeConfig
from slope_megatron.config.json_file import read_json
from slope_megatron.config.saved import WEIGHTS, SavedConfig
from slope_megatron.models.canonical import sharded_state_dict
from slope_megatron.models.dense import load_dense
from slope_megatron.models.dense_checkpoint import MegatronCheckpoint
from slope_megatron.models.layer_spec import sparse_modules
from slope_megatron.storage import metadata, sums
from slope_megatron.storage.tensors import CheckedReader
from slope_megatron.training import wanda
from slope_megatron.training.checkpoint import store
from slope_megatron.training.checkpoint.sharded_load import load_sharded

logger = logging.getLogger(__name__)
ADAPTERS = (".adapter_l", ".adapter_r")
# What decides names, shapes and meaning of packed tensors.
PACKED_FORM = ("nm", "nm_by_block", "dense_blocks", "dense_first_linear", "sparse_attention", "sparse_mlp")
OTHER_START = "copy it again, or give another --init-from"
FREE_IN_MODEL = ("dropout", "init_std", "max_positions")


def check_init(config: Config, samples: int, origins: Mapping[str, str] | None = None) -> None:
    """Refuse, before anything is written, a checkpoint that this run cannot start from; rank 0 calls it.

    Args:
        samples: in the training dataset.
        origins: of `read_config`: where each setting came from that is no default; None: all were chosen.
    Raises:
        ValueError: no such checkpoint, a corrupt one, or one of another model; or it would be pruned at random
            without anybody's having asked for that.
    """
    folder = checkpoint_of(config)
    if sums.manifest_of(folder):
        # Not the tensors, of hundreds of GB, by one rank while all wait: each is compared when it is read.
        sums.check_before_reading(folder, OTHER_START)
    if not is_packed(folder):
        MegatronCheckpoint(folder)
        check_pattern(config, folder, origins)
        wanda.check(config, samples)
        return
    if not config.slope.packed:
        raise ValueError(
            f"{folder} holds a packed model and this run's first weights are dense: leave --no-slope, --slope-method "
            "or --slope-dense-start out"
        )
    state = read_json(folder / "state.json", OTHER_START)
    saved = SavedConfig.read(state).check(folder, WEIGHTS).values
    differences = [
        f"{section}.{key}: {saved[section][key]!r} there, {value!r} here"
        for section, key, value in _form(config)
        if saved[section][key] != value
    ]
    before, now = _positions(saved), _positions(config.to_dict())
    if before != now:
        differences.append(f"--max-positions (or the sequence length): {before} there, {now} here")
    if differences:
        raise ValueError(
            f"{folder} is of another model ({'; '.join(differences)}): give the same settings, or another --init-from"
        )
    _check_adapters(folder, config, saved, state["steps_done"])


def check_pattern(config: Config, folder: Path, origins: Mapping[str, str] | None) -> None:
    """Trained weights are pruned at random only where that was asked for by name; said where only a file asks for it.

    Raises:
        ValueError: random is the default alone.
    """
    if not config.slope.packed or config.slope.pattern != "random" or origins is None:
        return
    origin = origins.get("slope.pattern")
    if origin is None:
        raise ValueError(
            f"{folder} holds trained dense weights and --slope-pattern is random by default, which would drop them "
            "whatever their size: give --slope-pattern magnitude (or wanda); or random, to have just that"
        )
    if origin != "flag":
        logger.warning(
            "%s asks for --slope-pattern random: the trained dense weights of %s are pruned whatever their size; "
            "--slope-pattern magnitude keeps the largest",
            *(origin, folder),
        )


def _form(config: Config):
    """(section, key, value) of everything that must agree with a packed checkpoint."""
    values = config.to_dict()
    for key, value in values["model"].items():
        if key not in FREE_IN_MODEL:
            yield "model", key, value
    for key in PACKED_FORM:
        yield "slope", key, values["slope"][key]


def _positions(values: dict) -> int | None:
    """Rows of the learned position table."""
    if values["model"]["position"] != "learned":
        return None
    return values["model"]["max_positions"] or values["data"]["seq_length"]


def _check_adapters(folder: Path, config: Config, saved: dict, steps_done: int) -> None:
    rank = saved["slope"]["adapter_rank"]
    if _adapters_count(saved, steps_done) and (config.slope.adapter_rank != rank or config.adapter_start):
        raise ValueError(
            f"the adapters of {folder} have joined its model: go on with them from the first step "
            f"(--slope-adapter-rank {rank} --slope-lazy-fraction 1.0), or start from a checkpoint of before"
        )


def _adapters_count(saved: dict, steps_done: int) -> bool:
    """Whether the weights of a checkpoint, given its configuration's values, are nothing without its adapters."""
    rank, fraction = saved["slope"]["adapter_rank"], saved["slope"]["lazy_fraction"]
    slope = SlopeConfig(adapter_rank=rank, lazy_fraction=fraction)
    return slope.adapters_count(saved["train"]["steps"], steps_done)


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run folder.

    Raises:
        ValueError: a run folder without a complete checkpoint.
    """
    path = Path(path)
    return store.newest(path) if (path / "checkpoints").is_dir() else path


def checkpoint_of(config: Config) -> Path:
    """The checkpoint that `--init-from` means.

    Raises:
        ValueError: there is no `--init-from`; or as `resolve`.
    """
    if config.train.init_from is None:
        raise ValueError("--init-from is unset: name the checkpoint to start from")
    return resolve(config.train.init_from)


def is_packed(folder: Path) -> bool:
    """Whether it is a checkpoint with packed tensors."""
    if not (folder / metadata.NAME).is_file():
        return False
    return any(name.endswith(".weight_pattern") for name in CheckedReader(folder).read_metadata().state_dict_metadata)


def load_init(model: torch.nn.Module, config: Config, tokenizer_size: int, dataset) -> None:
    """Fill a built model from `--init-from`; all ranks call it, after `check_init`.

    Args:
        tokenizer_size: entries of the tokenizer.
        dataset: training samples, which Wanda measures its norms on.
    """
    folder = checkpoint_of(config)
    if is_packed(folder):
        load_packed(model, folder)
        return
    source, masks = MegatronCheckpoint(folder), None
    if config.slope.packed and config.slope.pattern == "wanda":
        dtype = next(model.parameters()).dtype
        masks = wanda.calibrated_masks(config, tokenizer_size, dtype, source, dataset)
    load_dense(model, config, source, config.slope.pattern, masks)


@torch.no_grad()
def load_packed(model: torch.nn.Module, folder: Path) -> None:
    """Values, row and column patterns, and adapters if they had joined; at any layout.

    The optimizer starts anew, from masters that are these weights.
    """
    written = read_json(folder / "state.json", OTHER_START)
    kept = _adapters_count(SavedConfig.read(written).values, written["steps_done"])
    state = {name: entry for name, entry in sharded_state_dict(model).items() if kept or not name.endswith(ADAPTERS)}
    fresh = not kept and any(name.endswith(ADAPTERS) for name in model.state_dict())
    loaded = load_sharded(state, folder, OTHER_START)
    model.load_state_dict(loaded, strict=False)
    for module in sparse_modules(model):
        module.drop_operands()
    logger.info("weights and patterns of %s%s", folder, "; its adapters are new" if fresh else "")
