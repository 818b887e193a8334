"""SdpaAttention: Megatron's core attention on torch's scaled_dot_product_attention, with its flash kernels."""

import contextlib
import functools

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide
from torch.nn.attention import SDPBackend, sdpa_kernel

from slope_megatron.layers.rotary import apply_rope

# torch's kernels of each backend that Megatron names; of `auto`, torch chooses. What a kernel cannot do, torch refuses.
KERNELS = {
    AttnBackend.flash: [SDPBackend.FLASH_ATTENTION],
    AttnBackend.fused: [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    AttnBackend.unfused: [SDPBackend.MATH],
}


class SdpaAttention(MegatronModule):
    """Softmax(Q K^T / sqrt(d)) V in the constructor dialect of Megatron's `DotProductAttention`.

    Query-key layer scaling divides the scores by the layer's number and multiplies them by it inside the softmax, which
    keeps fp16 scores small: here they are fp32, and it changes nothing.
    With a `rotary_base` it applies rotary embeddings to Q and K first, for a model whose Megatron part has none.
    Shapes: query `[s, b, heads, d]`, key and value `[s, b, groups, d]` of this rank; output `[s, b, heads * d]`.
    """

    @classmethod
    def configured(cls, rotary_base: int) -> type:
        """This class with `rotary_base` bound: what Megatron's layer specs take."""
        return type(cls.__name__, (cls,), {"__init__": functools.partialmethod(cls.__init__, rotary_base=rotary_base)})

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        rotary_base: int | None = None,
        **_,
    ):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError(
                f"context_parallel_size is {config.context_parallel_size}: SdpaAttention sees one rank's "
                "sequence only; use 1"
            )
        if config.window_size is not None:
            raise ValueError("window attention is not supported by SdpaAttention: leave it off")
        for name, plain in (("softmax_type", "vanilla"), ("qk_clip", False), ("log_max_attention_logit", False)):
            # Options of later cores. The first changes the softmax; the others need the attention scores, which flash
            # kernels never write.
            if getattr(config, name, plain) != plain:
                raise ValueError(
                    f"{name} is {getattr(config, name)!r}: SdpaAttention has {plain!r} alone; leave it out"
                )
        self.kernels = KERNELS.get(config.attention_backend)
        self.attn_mask_type = attn_mask_type
        self.rotary_base = rotary_base
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        tp = pg_collection.tp.size() if pg_collection else config.tensor_model_parallel_size
        self.grouped = divide(config.num_attention_heads, tp) != divide(config.num_query_groups, tp)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params=None,
    ) -> torch.Tensor:
        """`attention_mask` is True where attention is forbidden (Megatron's convention); unused when causal."""
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention bias and packed sequences are not supported by SdpaAttention: leave them unset")
        if self.rotary_base is not None:
            query, key = apply_rope(query, self.rotary_base), apply_rope(key, self.rotary_base)
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        allowed = None if causal or attention_mask is None else ~attention_mask
        # Each rank drops its own heads: the tensor-parallel random state, as in Megatron's own attention.
        dropout = self.dropout if self.training else 0.0
        random = tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext()
        with random, sdpa_kernel(self.kernels) if self.kernels else contextlib.nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=self.grouped,
            )
        return context.permute(2, 0, 1, 3).flatten(-2)
