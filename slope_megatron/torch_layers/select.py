"""Which linears of a model are pruned, and why the others stay dense."""

import fnmatch
import logging
from collections.abc import Iterator, Sequence

import torch

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.packed_weight import input_unit

logger = logging.getLogger(__name__)


def is_conv1d(module: torch.nn.Module) -> bool:
    """GPT-2's linear, whose weight is `[K, N]`; told by name: transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """The dense weight as `[N, K]`."""
    weight = module.get_parameter("weight")
    return weight.t() if is_conv1d(module) else weight


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern`, with wildcards, covers whole parts of a dotted name: `h.0.attn`, `*_proj`, `lm_head`."""
    return fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")


def to_prune(model: torch.nn.Module, slope: SlopeConfig, skip: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The linears by name; the log says which others stay dense, and why.

    Raises:
        ValueError: nothing is left to prune, an entry of `skip` is no module's name, or experts would stay dense.
    """
    check_skip(model, skip)
    refuse_experts(model, skip)
    chosen, blocks = {}, in_blocks(model)
    tied = shared_weights(model)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) and not is_conv1d(module):
            continue
        if any(matches(name, pattern) for pattern in skip):
            logger.info("%s stays dense: skip names it", name)
        elif blocks and module not in blocks:
            logger.info("%s stays dense: it is outside the model's blocks", name)
        elif reason := unsuitable(module, slope, tied):
            logger.warning("%s stays dense: %s", name, reason)
        else:
            chosen[name] = module
    if not chosen:
        raise ValueError(
            f"no linear of this {type(model).__name__} can be pruned {slope.nm}: it must hold nn.Linear or Conv1D "
            f"layers outside {list(skip)}, of widths that {slope.nm} divides; the log names each and why it stays dense"
        )
    return chosen


def in_blocks(model: torch.nn.Module) -> set[torch.nn.Module]:
    """All modules within a list of modules, which is where transformers keep their blocks, if linears are among them.

    What is outside, embeddings, poolers and heads, stays dense as in SLoPe. A model without such a list has no outside.
    """
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    inside = {module for found in lists for module in found.modules()}
    return inside if any(isinstance(module, torch.nn.Linear) or is_conv1d(module) for module in inside) else set()


def shared_weights(model: torch.nn.Module) -> set[int]:
    """Ids of the parameters that several modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def unsuitable(module: torch.nn.Module, slope: SlopeConfig, tied: set[int]) -> str | None:
    """Why a linear cannot be pruned; None: it can."""
    if type(module) is not torch.nn.Linear and not is_conv1d(module):
        return f"it is a {type(module).__name__}, whose forward may be another"
    if id(module.weight) in tied:
        return "its weight is tied to another module's"
    rows, columns = weight_of(module).shape
    if rows % slope.m or columns % input_unit(slope):
        return f"{rows} x {columns} (out x in) is no multiple of {slope.m} x {input_unit(slope)}"
    return None


def check_skip(model: torch.nn.Module, skip: Sequence[str]) -> None:
    if isinstance(skip, str):
        raise ValueError(f"skip is the string {skip!r}: give a list of names, such as skip=[{skip!r}]")
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"skip names {pattern!r}, and no module has such a name: see model.named_modules()")


def refuse_experts(model: torch.nn.Module, skip: Sequence[str]) -> None:
    for name, parameter in fused_experts(model):
        if not any(matches(name, pattern) for pattern in skip):
            raise ValueError(
                f"{name} holds the experts' weights as one tensor {tuple(parameter.shape)}: only two-dimensional "
                f"linears can be packed; leave them dense with skip=[{name!r}]"
            )


def fused_experts(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, module in model.named_modules():
        if "expert" in f"{name}.{type(module).__name__}".lower():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield f"{name}.{leaf}", parameter
