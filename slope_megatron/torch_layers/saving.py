"""What a sparse model leaves on disk: `save_pretrained` writes plain weights, and beside them what they lack.

    model.safetensors ...   dense weights with zeros, as the plain model has them; adapters that have joined are added
    slope_state.pt          packed values, patterns and adapters, by the names of the sparse model's state dict

Any other loader reads the former alone; `load_sparse_state` the latter, into a model that was sparsified alike.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from slope_megatron.sparsity.packing import unpack, unpack_bits
from slope_megatron.torch_layers.linear import SlopeLinear, sparse_linears

logger = logging.getLogger(__name__)
FILE = "slope_state.pt"


def dense_weight(linear: SlopeLinear, state: dict | None = None, prefix: str = "") -> torch.Tensor:
    """The plain layer's weight, `[N, K]` or `[K, N]`.

    Args:
        state: a state dict to read instead of the layer's own tensors.
    """
    state = linear.state_dict() if state is None else state
    weight_NK = unpack(state[f"{prefix}weight"], unpack_bits(state[f"{prefix}weight_pattern"]))
    if linear.adapters_active:
        factors = state[f"{prefix}adapter_r"].float() @ state[f"{prefix}adapter_l"].float()
        weight_NK = (weight_NK.float() + factors / linear.slope.rank).to(weight_NK.dtype)
    return (weight_NK.t() if linear.transposed else weight_NK).contiguous()


def save_pretrained(model: torch.nn.Module, save_directory, *arguments, state_dict: dict | None = None, **keywords):
    """As the method of that name, with plain weights and `slope_state.pt`."""
    given = model.state_dict() if state_dict is None else state_dict
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in given.items()}
    plain, packed = dict(state), {}
    for name, linear in sparse_linears(model).items():
        prefix = f"{name}."
        if f"{prefix}weight" not in state:
            continue  # a rank that others gather to
        own = [key for key in linear.state_dict() if key != "bias"]
        packed.update({prefix + key: plain.pop(prefix + key) for key in own})
        plain[f"{prefix}weight"] = dense_weight(linear, state, prefix)
    if any(linear.adapters_active for linear in sparse_linears(model).values()):
        logger.warning("adapters are added to the weights that %s gets, which have no zeros then", save_directory)
    plain_class: Any = type(model)
    result = plain_class.save_pretrained(model, save_directory, *arguments, state_dict=plain, **keywords)
    if packed and keywords.get("is_main_process", True):
        temporary = Path(save_directory) / f"{FILE}.tmp"
        torch.save(packed, temporary)
        os.replace(temporary, Path(save_directory) / FILE)
    return result


def load_sparse_state(model: torch.nn.Module, folder: str | os.PathLike) -> None:
    """Packed values, patterns and adapters of a folder that `save_pretrained` wrote, to the bit.

    Raises:
        ValueError: there is no such file, or its layers are not those of `model`.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE}: give a folder that a sparse model's save_pretrained wrote")
    state = torch.load(path, map_location="cpu", weights_only=True)
    linears = sparse_linears(model)
    wanted = {f"{name}.{key}" for name, linear in linears.items() for key in linear.state_dict() if key != "bias"}
    if different := sorted(wanted ^ state.keys()):
        raise ValueError(
            f"{path} and this model differ in {different[0]}: call sparsify with the arguments of the run that wrote it"
        )
    for name, linear in linears.items():
        own = {key: state[f"{name}.{key}"] for key in linear.state_dict() if key != "bias"}
        linear.load_state_dict(own, strict=False)
