"""`slope export packed`: a run's checkpoint in the form of `inference.packed_file`: values, patterns, adapters."""

import dataclasses
import math
from pathlib import Path

import torch

from slope_megatron.config.saved import saved_form
from slope_megatron.export import output_folder
from slope_megatron.export.experts_model import ExpertsModel
from slope_megatron.export.output_folder import (
    Entry,
    new_folder,
    plan_files,
    total_bytes,
    write_files,
    write_json,
)
from slope_megatron.export.trained_model import TrainedModel
from slope_megatron.inference.packed_file import FORMAT, PATTERN
from slope_megatron.storage import sums


def plan(source: TrainedModel, max_shard_bytes: int = 5 * 10**9) -> dict[str, list[Entry]]:
    """
    Raises:
        ValueError: an encoder, or a mixture of experts.
    """
    if isinstance(source.model, ExpertsModel):
        raise ValueError("the packed form has no experts: use `slope export hf`")
    if source.model.architecture != "gpt":
        raise ValueError(
            f"the run's architecture is {source.model.architecture}: the packed form is for decoders that generate; "
            "use `slope export hf`"
        )
    return plan_files((Entry(name, source.shape(name), source.dtype(name)) for name in sorted(source)), max_shard_bytes)


def sparse_bytes(source: TrainedModel) -> dict[str, int]:
    """Bytes of the sparse linears' weights: as they are stored here, and as the same linears dense."""
    packed = dense = 0
    for name in source:
        if source.is_packed(name):
            pattern = math.prod(source.shape(f"{name}{PATTERN}"))
            packed += math.prod(source.shape(name)) * source.dtype(name).itemsize + pattern
            dense += 8 * pattern * source.dtype(name).itemsize
    return {"packed": packed, "dense": dense}


def describe(source: TrainedModel, files: dict[str, list[Entry]], target: Path) -> str:
    """For people, a line a file."""
    sizes, lines = sparse_bytes(source), ["config.json", *tokenizer_files(source), sums.FOLDER]
    if sizes["dense"]:
        share = sizes["packed"] / sizes["dense"]
        lines.insert(0, f"sparse linears: {sizes['packed']:,} bytes, {share:.4f} of the same ones dense")
    return output_folder.describe(f"{target}: packed model of step {source.step}", files, lines)


def tokenizer_files(source: TrainedModel) -> dict[str, bytes]:
    """`{file name: content}`, as data are prepared with them."""
    return source.tokenizer.files if source.tokenizer is not None else {}


@torch.no_grad()
def export(source: TrainedModel, files: dict[str, list[Entry]], target: Path) -> None:
    """Write what was planned; the folder appears when it is complete."""
    model = dataclasses.asdict(source.model)
    with new_folder(target, total_bytes(files)) as folder:
        write_files(folder, files, ((name, source[name]) for name in sorted(source)))
        for name, content in tokenizer_files(source).items():
            (folder / name).write_bytes(content)
        write_json(
            folder / "config.json",
            {
                "model_type": "slope-packed",
                "format": FORMAT,
                "model": model,
                "config_active": saved_form({"model": model})["config_active"],
                "nm": source.config.slope.nm if source.config.slope.enabled else None,
                "dtype": str(source.dtype("embedding.word_embeddings.weight")).removeprefix("torch."),
                "step": source.step,
                "sparse_linears_bytes": sparse_bytes(source),
            },
        )
