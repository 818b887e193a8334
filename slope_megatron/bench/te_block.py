"""A whole dense block of Transformer Engine's own, in bf16 and in FP8: what dense models train with elsewhere.

Its norms, linears, attention, MLP and residuals are fused as it fuses them. FP8 is e4m3 with one scale a tensor of the
present values, as in this project's `fp8`; a weight is rounded in the first micro-batch, which is not timed.
"""

import contextlib
import importlib.util

import torch

from slope_megatron.bench.linears import DTYPE
from slope_megatron.bench.models import Model

ACTIVATIONS = {"silu": "swiglu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu"}


def is_installed() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


class TeBlock(torch.nn.Module):
    """In bf16; `[T, H]` -> `[T, H]`, sequences of `sequence` tokens."""

    fp8 = False

    def __init__(self, model: Model, sequence: int, device: str = "cuda"):
        super().__init__()
        import transformer_engine.pytorch as te

        shape = model.architecture
        self.sequence, self.rounded = sequence, False
        self.block = te.TransformerLayer(
            shape.hidden_size,
            shape.ffn,
            shape.num_attention_heads,
            num_gqa_groups=shape.query_groups,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            self_attn_mask_type="causal",
            attn_input_format="bshd",
            fuse_qkv_params=True,
            params_dtype=DTYPE,
            bias=shape.linear_bias,
            activation=ACTIVATIONS[shape.activation],
            normalization=shape.normalization,
            device=device,
        )
        self.positions = None
        if shape.position == "rope":
            width = shape.hidden_size // shape.num_attention_heads
            self.positions = te.RotaryPositionEmbedding(width, rotary_base=shape.rotary_base)(sequence).to(device)

    def numbers(self):
        """The formats of its products, as a context."""
        if not self.fp8:
            return contextlib.nullcontext()
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe

        return te.autocast(enabled=True, recipe=recipe.Float8CurrentScaling(fp8_format=recipe.Format.E4M3))

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        first, self.rounded = not self.rounded, True
        x_bsH = x_TH.view(-1, self.sequence, x_TH.shape[-1])
        with self.numbers():
            return self.block(x_bsH, is_first_microbatch=first, rotary_pos_emb=self.positions).view_as(x_TH)


class TeFloat8Block(TeBlock):
    """With its linears' products in FP8."""

    fp8 = True


def wrong(kind: type[TeBlock], model: Model) -> str | None:
    """Why a block of this kind cannot be timed here; None: it runs forward and backward. Whatever it raises is one."""
    x = torch.randn(256, model.hidden, device="cuda", dtype=DTYPE, requires_grad=True)
    try:
        y = kind(model, 128)(x)
        y.backward(torch.randn_like(y))
    except Exception as error:  # the library has its own types
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if x.grad is None or not bool(y.isfinite().all() & x.grad.isfinite().all()):
        return "wrong results on this GPU: its Y or dX is not finite"
    return None
