"""Decoder: OPT, GPT-2, LLaMA and Mistral shapes in plain torch, from tensors by canonical name.

b prompts, s new tokens, H heads, G key/value groups, d width of a head, V vocabulary.

    block   x = x + Attention(Norm(x));  x = x + MLP(Norm(x))
    logits  Norm(x) E^T

Attention always reads keys and values from the cache, where position p lies in slot p. A token at position p sees the
slots 0..p, so whatever lies behind (the padding of a shorter prompt, until its own tokens overwrite it) is never seen.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from slope_megatron.config import ModelConfig
from slope_megatron.inference.linear import SparseLinear, build_linear

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}


@dataclasses.dataclass
class Cache:
    """Keys and values of every block, `[layers, b, G, slots, d]`."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def slots(self) -> int:
        return self.keys.shape[3]


class Norm(torch.nn.Module):
    """LayerNorm, or RMSNorm where there is no bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rotary_angles(positions: torch.Tensor, width: int, base: int) -> torch.Tensor:
    """Angles in fp32, as in training, `[b, 1, s, d]`; both halves of a head have the same ones."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    half = positions[:, None, :, None].float() * (1.0 / base**exponents)
    return torch.cat((half, half), dim=-1)


def apply_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `[b, heads, s, d]`."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + rotated * angles.sin().to(x.dtype)


class Block(torch.nn.Module):
    """One transformer block."""

    def __init__(self, model: ModelConfig, tensors: Mapping[str, torch.Tensor], index: int, load, backend: str):
        super().__init__()
        self.model = model
        prefix = f"decoder.layers.{index}."
        linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        self.qkv, self.proj, self.fc1, self.fc2 = (
            build_linear(tensors, prefix + name, load, backend) for name in linears
        )
        self.attention_norm = build_norm(model, tensors, f"{prefix}self_attention.linear_qkv.layer_norm_", load)
        self.mlp_norm = build_norm(model, tensors, f"{prefix}mlp.linear_fc1.layer_norm_", load)
        self.head_norms = torch.nn.ModuleList(
            build_norm(model, tensors, f"{prefix}self_attention.{name}_layernorm.", load)
            for name in ("q", "k")
            if model.qk_norm
        )
        self.activation = ACTIVATIONS[model.activation]

    def forward(self, x, positions, angles, keys, values) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), positions, angles, keys, values)
        hidden = self.fc1(self.mlp_norm(x))
        if self.model.gated_mlp:
            gate, up = hidden.chunk(2, dim=-1)
            return x + self.fc2(self.activation(gate) * up)
        return x + self.fc2(self.activation(hidden))

    def attention(self, x, positions, angles, keys, values) -> torch.Tensor:
        """`x` `[b, s, hidden]`; `keys`, `values` `[b, G, slots, d]` are this block's cache, written here."""
        heads, groups = self.model.num_attention_heads, self.model.query_groups
        fused = self.qkv(x).unflatten(-1, (groups, heads // groups + 2, -1))
        query = fused[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = (fused[..., index, :].transpose(1, 2) for index in (-2, -1))
        if self.head_norms:
            query, key = (norm(x) for norm, x in zip(self.head_norms, (query, key), strict=True))
        if angles is not None:
            query, key = apply_rope(query, angles), apply_rope(key, angles)
        slots = positions[:, None, :, None].expand_as(key)
        keys.scatter_(2, slots, key)
        values.scatter_(2, slots, value)
        seen = torch.arange(keys.shape[2], device=x.device) <= positions[:, None, :, None]
        context = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, enable_gqa=heads != groups
        )
        return self.proj(context.transpose(1, 2).flatten(2))


class Decoder(torch.nn.Module):
    """See the module's docstring."""

    def __init__(
        self,
        model: ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        """
        Args:
            tensors: canonical name -> tensor, packed linears as in `packed_file`; read once, one after the other.
            dtype: to compute in; None: the tensors' own.
        Raises:
            ValueError: an encoder, or a tensor is missing.
        """
        super().__init__()
        if model.architecture != "gpt":
            raise ValueError(
                f"the model's architecture is {model.architecture}: only decoders (gpt) generate text; for the others "
                "use `slope export hf`"
            )
        load = functools.partial(load_tensor, device=torch.device(device), dtype=dtype)
        try:
            self.words = load(tensors["embedding.word_embeddings.weight"])
            self.positions = (
                load(tensors["embedding.position_embeddings.weight"]) if model.position == "learned" else None
            )
            self.blocks = torch.nn.ModuleList(
                Block(model, tensors, index, load, backend) for index in range(model.num_layers)
            )
            self.final_norm = build_norm(model, tensors, "decoder.final_layernorm.", load)
            self.output = self.words if model.tie_embeddings else load(tensors["output_layer.weight"])
        except KeyError as missing:
            raise ValueError(f"the model has no tensor {missing}: export the run again") from None
        self.model = model
        self.dtype, self.device = self.words.dtype, self.words.device

    @property
    def vocabulary(self) -> int:
        return self.output.shape[0]

    @property
    def max_positions(self) -> int:
        """Positions that the model was built for.

        Raises:
            ValueError: rotary positions, and the architecture does not say how many.
        """
        if self.positions is not None:
            return self.positions.shape[0]
        if self.model.max_positions is None:
            raise ValueError("the model's max_positions is unset, which rotary positions need: export the run again")
        return self.model.max_positions

    def new_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens of each of `batch` prompts."""
        width = self.model.hidden_size // self.model.num_attention_heads
        shape = (self.model.num_layers, batch, self.model.query_groups, slots, width)
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return Cache(keys, torch.zeros_like(keys))

    @torch.no_grad()
    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """Logits `[b, s, V]` of `tokens` `[b, s]` at `positions` `[b, s]` (by default 0..s-1), after what `cache`
        holds; the cache then holds these as well.

        Raises:
            ValueError: more tokens than the position table has rows; with a cache, they are a prompt's padding.
        """
        if cache is None and self.positions is not None and tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens were given and the model has {self.max_positions} positions: give fewer"
            )
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        cache = cache or self.new_cache(tokens.shape[0], tokens.shape[1])
        x = self.words[tokens]
        angles = None
        if self.positions is not None:
            x = x + self.positions[positions.clamp(max=len(self.positions) - 1)]
        else:
            width = self.model.hidden_size // self.model.num_attention_heads
            angles = rotary_angles(positions, width, self.model.rotary_base)
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block(x, positions, angles, keys, values)
        return self.final_norm(x) @ self.output.t()

    def linear_bytes(self) -> dict[str, int]:
        """Stored bytes of the sparse linears: values and patterns, beside the same linears dense."""
        sparse = [module for module in self.modules() if isinstance(module, SparseLinear)]
        return {
            "packed": sum(module.packed_bytes for module in sparse),
            "dense": sum(module.dense_bytes for module in sparse),
        }


def load_tensor(tensor: torch.Tensor, *, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """On the device; floating-point numbers in `dtype`, bitmasks as they are."""
    return tensor.to(device, dtype) if dtype and tensor.is_floating_point() else tensor.to(device)


def build_norm(model: ModelConfig, tensors: Mapping[str, torch.Tensor], prefix: str, load) -> Norm:
    bias = load(tensors[f"{prefix}bias"]) if model.normalization == "LayerNorm" else None
    return Norm(load(tensors[f"{prefix}weight"]), bias, model.norm_eps)
