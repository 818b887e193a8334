"""sparsify and densify: a torch model's linears replaced in place by packed ones, and back."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.random_streams import RngState
from slope_megatron.torch_layers.linear import SlopeLinear, sparse_linears
from slope_megatron.torch_layers.masks import Calibrate, input_norms, row_mask
from slope_megatron.torch_layers.saving import dense_weight, save_pretrained
from slope_megatron.torch_layers.select import is_conv1d, to_prune, weight_of
from slope_megatron.torch_layers.training import count_micro_batches
from slope_megatron.torch_layers.whole import is_partitioned

# Of SlopeConfig's, those that mean something here.
SETTINGS = (
    *("mode", "token_groups", "backward_mask_interval", "backend", "fp8", "fp8_wgrad"),
    *("adapter_rank", "lazy_fraction"),
)


@torch.no_grad()
def sparsify(
    model: torch.nn.Module,
    nm: str = "2:4",
    pattern: str = "magnitude",
    skip: Sequence[str] = (),
    *,
    calibrate: Calibrate | None = None,
    seed: int = 0,
    **settings,
) -> torch.nn.Module:
    """Pack the linears of a model's blocks in place; before the optimizer, DDP, FSDP or DeepSpeed sees the model.

    Args:
        pattern: which weights are kept: "magnitude" (of the present ones), "random", or "wanda" (magnitude times the
            norm of the input, over what `calibrate(model)` runs through the dense model).
        skip: names of modules that stay dense, with wildcards: `["h.0.attn", "*.gate_proj"]`.
        seed: of random patterns, adapters and estimates.
        settings: `mode`, `adapter_rank`, `lazy_fraction`, `backward_mask_interval`, `backend`, `fp8` and others of
            `SlopeConfig`.
    Returns:
        the model itself.
    Raises:
        ValueError: what `to_prune` raises, a setting that does not apply, or weights that are not here.
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ValueError(f"sparsify has no setting {unknown[0]!r}: it has {', '.join(SETTINGS)}")
    slope = SlopeConfig(nm=nm, pattern=pattern, **settings)
    if width := getattr(getattr(model, "config", None), "hidden_size", None):
        slope = slope.with_rank_for(width)
    if (pattern == "wanda") != (calibrate is not None):
        raise ValueError(
            f"pattern is {pattern!r} and calibrate {'missing' if calibrate is None else 'given'}: wanda, and it alone, "
            "needs a function that runs samples through the model"
        )
    if sparse_linears(model):
        raise ValueError("this model is sparse already: call densify(model) first")
    linears = to_prune(model, slope, skip)
    for name, linear in linears.items():
        check_present(name, linear.get_parameter("weight"))
    norms = input_norms(model, linears, calibrate) if calibrate else {}
    state = RngState(seed)
    replace(
        model,
        {
            linear: SlopeLinear(
                weight_of(linear),
                row_mask(name, linear, slope, seed, norms),
                None if linear.bias is None else linear.get_parameter("bias"),
                slope=slope,
                name=name,
                state=state,
                transposed=is_conv1d(linear),
            )
            for name, linear in linears.items()
        },
    )
    if slope.mode == "full":
        count_micro_batches(model, state)
    if hasattr(model, "save_pretrained"):
        # A partial, which is copied and pickled with the model that it names.
        model.__dict__["save_pretrained"] = functools.partial(save_pretrained, model)
    return model


def check_present(name: str, weight: torch.Tensor) -> None:
    reason = None
    if weight.is_meta:
        reason = "is on the meta device"
    elif isinstance(weight, DTensor) or is_partitioned(weight):
        reason = "is cut over ranks already"
    if reason:
        raise ValueError(
            f"{name}.weight {reason}: sparsify reads whole weights; call it on the loaded model, before fully_shard, "
            "deepspeed.initialize or the Trainer"
        )


def replace(model: torch.nn.Module, new: dict[torch.nn.Module, torch.nn.Module]) -> None:
    """Wherever a module hangs, also in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child].train(child.training))


@torch.no_grad()
def densify(model: torch.nn.Module) -> torch.nn.Module:
    """Dense linears again, with zeros where weights were pruned; adapters that have joined are added in.

    Returns:
        the model itself. Optimizers know the packed Parameters: make a new one.
    """
    replace(model, {linear: dense_linear(linear) for linear in sparse_linears(model).values()})
    model.__dict__.pop("save_pretrained", None)
    return model


def dense_linear(linear: SlopeLinear) -> torch.nn.Module:
    weight = dense_weight(linear)
    dense: Any
    if linear.transposed:
        from transformers.pytorch_utils import Conv1D

        dense = Conv1D(1, 1)
        dense.nf, dense.nx = linear.out_features, linear.in_features
    else:
        dense = torch.nn.Linear(1, 1, bias=False)
        dense.in_features, dense.out_features = linear.in_features, linear.out_features
    dense.weight = torch.nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    dense.bias = linear.bias
    return dense
