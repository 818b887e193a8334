"""Sparse linears in any torch model, Hugging Face's among them; imports neither Megatron nor DeepSpeed."""

from slope_megatron.torch_layers.convert import densify, sparsify
from slope_megatron.torch_layers.linear import SlopeLinear, sparse_linears
from slope_megatron.torch_layers.saving import load_sparse_state
from slope_megatron.torch_layers.training import after_step, before_step, follow_optimizer, join_adapters

__all__ = [
    "SlopeLinear",
    "after_step",
    "before_step",
    "densify",
    "follow_optimizer",
    "join_adapters",
    "load_sparse_state",
    "sparse_linears",
    "sparsify",
]
