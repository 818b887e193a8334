"""`slope import hf`: a dense Hugging Face folder as a checkpoint that `slope pretrain --init-from` prunes on load.

    .metadata, *.distcp    megatron-core's torch_dist format, whole dense tensors by canonical name
    model.yaml             the architecture, for `slope pretrain --config`
    tokenizer files        as they came
    checksums.json         sizes and checksums

Weights are read from safetensors only: nothing is unpickled.
"""

import dataclasses
import math
import shutil
import warnings
from pathlib import Path

import torch

from slope_megatron.config import ModelConfig
from slope_megatron.config.json_file import read_json
from slope_megatron.config.yaml_file import write_yaml
from slope_megatron.export.experts_model import ExpertsModel
from slope_megatron.export.hf_config import as_dict, model_config
from slope_megatron.export.hf_import import HfWeights
from slope_megatron.export.output_folder import new_folder
from slope_megatron.export.trained_run import TOKENIZER_FILES
from slope_megatron.inference.packed_file import SafetensorsFolder
from slope_megatron.inference.weight_files import BESIDE
from slope_megatron.models.shapes import canonical_shapes, own_rows
from slope_megatron.storage import sums

ADAPTER = "adapter_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_folder(folder: Path) -> tuple[dict, HfWeights]:
    """Configuration and weights of a Hugging Face folder; the weights are read when they are asked for.

    Raises:
        ValueError: no such folder, pickled weights, a model that we have no form for, or tensors that do not fit it.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{folder} holds no config.json{where_it_may_be(folder)}: give the folder of a Hugging Face model"
        )
    fields = as_dict(read_json(config, "download the model again"))
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder} holds an adapter beside the model ({ADAPTER}): merge it (`merge_and_unload` of peft), or take "
            "the adapter's files out of the folder to import the model without it"
        )
    safetensors = [path for path in folder.glob("*.safetensors") if not path.name.startswith(BESIDE)]
    if not safetensors and any(path for kind in PICKLED for path in folder.glob(kind)):
        raise ValueError(
            f"{folder} has pickled weights only, which can run code when they are read: convert them to safetensors "
            "(`model.save_pretrained` of transformers writes them)"
        )
    if sums.manifest_of(folder):
        # Exported by this program: its weights are checked, the rest may have been edited.
        sums.check_folder(folder, "export the run again", lambda name: name.endswith(".safetensors"))
    state = SafetensorsFolder(folder)
    model = model_config(fields)
    if isinstance(model, ExpertsModel):
        raise ValueError(
            f"{folder} holds a mixture of experts, which `slope pretrain` does not train: import a dense model, or "
            "train this one in Megatron-LM with --slope"
        )
    weights = HfWeights(state, fields)
    check_shapes(state, weights, model)
    return fields, weights


def where_it_may_be(folder: Path) -> str:
    """A hint for folders that are near one: an adapter, the maker's own form, the hub's cache."""
    if (folder / ADAPTER).is_file():
        return " but an adapter (merge it into its model first: `merge_and_unload` of peft)"
    if (folder.parent / "config.json").is_file():
        return f" (the folder around it, {folder.parent}, does)"
    snapshots = sorted((folder / "snapshots").glob("*/config.json"))
    return f" ({snapshots[-1].parent} does)" if snapshots else ""


def check_shapes(state: SafetensorsFolder, weights: HfWeights, model: ModelConfig) -> None:
    """Compare shapes before a tensor is read.

    Raises:
        ValueError: names the tensor, its shape and the one that the configuration asks for.
    """
    expected = canonical_shapes(model, own_rows(model))
    for canonical, (_, how, names) in weights.rows.items():
        found = [state.shape(weights.keys_by_name[name]) for name in names]
        size = sum(math.prod(shape) for shape in found)
        wanted = math.prod(expected[canonical]) + (2 * model.hidden_size if how == "positions" else 0)
        if size != wanted:
            shapes = ", ".join("x".join(map(str, shape)) for shape in found)
            raise ValueError(
                f"{names[0]} has the shape {shapes}, and config.json asks for {wanted:,} elements there "
                f"({'x'.join(map(str, expected[canonical]))} in {canonical}): the weights are of another configuration"
            )


def total_bytes(weights: HfWeights, dtype: torch.dtype) -> int:
    shapes = canonical_shapes(weights.model, own_rows(weights.model))
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def import_hf(folder: Path, target: Path, dtype: torch.dtype = torch.float32) -> ModelConfig:
    """Convert; the whole model is in memory once. `target` appears when it is complete."""
    from torch.distributed import checkpoint

    from slope_megatron.storage.tensors import SummingWriter

    _, weights = open_folder(folder)
    with new_folder(target, total_bytes(weights, dtype), ".metadata") as partial:
        writer = SummingWriter(partial)
        state = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        with warnings.catch_warnings():
            # That one process writes is the intent.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.save(state, storage_writer=writer, no_dist=True)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        content = {key: value for key, value in dataclasses.asdict(weights.model).items() if value is not None}
        write_yaml(partial / "model.yaml", {"model": content})
        sums.write_manifest(partial, writer.entries)
    return weights.model
