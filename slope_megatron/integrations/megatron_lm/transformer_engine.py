"""Transformer Engine's layer specs with its linears taken out; its norms and its attention stay.

    in its spec                     here
    LayerNormLinear (QKV, fc1)      its norm, and apart from it Megatron's ColumnParallelLinear
    Linear (projection, fc2)        Megatron's RowParallelLinear
    DotProductAttention             the same

Its linears with the norm inside cannot give way to packed ones as they are: the norm would be left out. In checkpoints
a norm goes by its name inside the fused linear, as in Megatron's local spec: a dense model's norms, under Transformer
Engine or not, and a sparse one's are read by each other.
"""

import copy
import dataclasses
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

# A norm's prefix in a block, and in checkpoints.
NORM_NAMES = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_",
}


class NormApart:
    """Transformer Engine's LayerNorm or RMSNorm, without the extra state (of FP8): a fused linear's norm has none."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5):
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm(config, hidden_size, eps)
        norm.register_state_dict_post_hook(drop_extra_state)
        norm.register_load_state_dict_pre_hook(add_extra_state)
        return norm


def drop_extra_state(norm, state_dict, prefix, _metadata) -> None:
    state_dict.pop(f"{prefix}_extra_state", None)


def add_extra_state(norm, state_dict, prefix, *_) -> None:
    """None, which Transformer Engine takes for no state: a strict load wants the key."""
    state_dict.setdefault(f"{prefix}_extra_state", None)


def is_fused(linear) -> bool:
    """Whether a spec's linear is Transformer Engine's with the norm inside."""
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    return linear is TELayerNormColumnParallelLinear


def norms_apart(stock: ModuleSpec) -> ModuleSpec:
    """A copy of a block's spec with each fused norm and linear as two, and Megatron's own linears.

    A spec without such linears comes back as it is, and so does an MLP without them (experts).
    """
    if not is_fused(getattr(stock.submodules.self_attention.submodules, "linear_qkv", None)):
        return stock
    stock = copy.deepcopy(stock)
    block, names = stock.submodules, ["input_layernorm"]
    attention = block.self_attention.submodules
    mlp: Any = getattr(block.mlp, "submodules", None)
    attention.linear_qkv, attention.linear_proj = ColumnParallelLinear, RowParallelLinear
    if is_fused(getattr(mlp, "linear_fc1", None)):
        names.append("pre_mlp_layernorm")
        linears = dataclasses.replace(mlp, linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        block.mlp = ModuleSpec(module=MLP, submodules=linears)
    for name in names:
        setattr(block, name, NormApart)
    block.sharded_state_dict_keys_map = {f"{name}.": NORM_NAMES[name] for name in names}
    return stock
