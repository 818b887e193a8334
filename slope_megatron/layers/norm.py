"""Norm: torch's LayerNorm or RMSNorm where Megatron's local spec has nothing but a wrapper of them.

Megatron's wrapper (`WrappedTorchNorm`, its choice without apex) refuses sequence parallelism. A norm works on each
token alone, so a part of the sequence is as good as all of it; its parameters' gradients must then be summed over the
tensor-parallel ranks, which Megatron's `sequence_parallel` mark asks for.
"""

from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from slope_megatron.layers.fused import FusedLayerNorm, FusedRMSNorm
from slope_megatron.layers.marks import mark


class Norm:
    """Called as Megatron calls its norms, gives a `torch.nn` module `[s, b, h]` -> `[s, b, h]` with marked parameters.

    Raises:
        ValueError: an option that torch's norms do not have, and that would change results or memory.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        for name in ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm"):
            if getattr(config, name, False):
                raise ValueError(f"{name} is on and torch's norms do not have it: install apex, or leave it off")
        norm_class = FusedRMSNorm if config.normalization == "RMSNorm" else FusedLayerNorm
        norm = norm_class(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            mark(parameter, sequence_parallel=config.sequence_parallel)
        return norm


def own_norm(stock: type) -> type:
    """`stock` as the installed Megatron's spec names it; ours instead of its wrapper."""
    return Norm if stock is WrappedTorchNorm else stock
