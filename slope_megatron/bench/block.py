"""A whole transformer block, from one description for every kind of linear; all else is the same.

T = batch x sequence tokens, H hidden, F ffn. Pre-norm, as OPT (LayerNorm, biases, ReLU) or LLaMA (RMSNorm, rotary
positions, grouped queries, SwiGLU):
    r = x + proj(attention(qkv(norm(x)))),   y = r + fc2(activation(fc1(norm(r))))
Attention is torch's scaled_dot_product_attention; norms, biases, activations and residuals are fused by torch.compile.
"""

from typing import TypeAlias, cast

import torch
import torch.nn.functional as F

from slope_megatron.bench.linears import DTYPE, LinearMaker
from slope_megatron.bench.models import Model
from slope_megatron.bench.te_block import TeBlock
from slope_megatron.layers.fused import allow_variants

SEQUENCE = 2048
# What `Block` takes, or a block of others.
BlockMaker: TypeAlias = LinearMaker | dict[str, LinearMaker] | type[TeBlock]
# A variant of the functions below for each model and pass.
allow_variants()


@torch.compile
def add_layer_norm(residual, x, bias, weight, shift):
    """r = residual + x + bias, and LayerNorm(r)."""
    residual = residual + (x + bias)
    return residual, F.layer_norm(residual, (residual.shape[-1],), weight, shift)


@torch.compile
def layer_norm(x, weight, shift):
    return F.layer_norm(x, (x.shape[-1],), weight, shift)


@torch.compile
def add_rms_norm(residual, x, weight):
    """r = residual + x, and RMSNorm(r)."""
    residual = residual + x
    return residual, F.rms_norm(residual, (residual.shape[-1],), weight)


@torch.compile
def rms_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight)


@torch.compile
def bias_relu(x, bias):
    return F.relu(x + bias)


@torch.compile
def add_bias(residual, x, bias):
    return residual + (x + bias)


@torch.compile
def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@torch.compile
def rotate(x, cos, sin):
    """Rotary positions on `[B, S, heads, d]`; angles `[S, 1, d/2]`."""
    left, right = x.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


class Block(torch.nn.Module):
    """See the file's docstring; `linear` is one of `linears.MODES`, or one for each of `model.linears()`."""

    def __init__(self, model: Model, linear: LinearMaker | dict[str, LinearMaker]):
        super().__init__()
        self.architecture, hidden = model.architecture, model.hidden
        kinds = linear if isinstance(linear, dict) else dict.fromkeys(model.linears(), linear)
        biased = {"qkv": not self.architecture.gated_mlp}
        # Biases other than qkv's are added by the fused pointwise functions, as Megatron does.
        self.linears = torch.nn.ModuleDict(
            {name: kinds[name](*shape, biased.get(name, False)) for name, shape in model.linears().items()}
        )
        vectors = {"norm1": hidden, "norm2": hidden}
        if not self.architecture.gated_mlp:
            vectors |= {"shift1": hidden, "shift2": hidden, "proj": hidden, "fc1": self.architecture.ffn, "fc2": hidden}
        self.vectors = torch.nn.ParameterDict(
            {name: torch.ones(size, device="cuda", dtype=DTYPE) for name, size in vectors.items()}
        )
        if self.architecture.gated_mlp:
            width = hidden // self.architecture.num_attention_heads
            speed = 5e5 ** -(torch.arange(0, width, 2, device="cuda") / width)
            angle = torch.arange(SEQUENCE, device="cuda")[:, None, None] * speed
            self.cos, self.sin = angle.cos(), angle.sin()

    def attention(self, qkv):
        """`qkv` `[T, H + 2 groups d]` -> `[T, H]`."""
        model = self.architecture
        width = model.hidden_size // model.num_attention_heads
        sizes = [model.hidden_size, *(2 * [model.query_groups * width])]
        q, k, v = (part.view(-1, SEQUENCE, part.shape[-1] // width, width) for part in qkv.split(sizes, -1))
        if self.architecture.gated_mlp:
            q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=model.query_groups != model.num_attention_heads
        )
        return context.transpose(1, 2).reshape(-1, model.hidden_size)

    def forward(self, x):
        linears, vectors = self.linears, self.vectors
        if self.architecture.gated_mlp:
            out = linears["proj"](self.attention(linears["qkv"](rms_norm(x, vectors["norm1"]))))
            residual, normed = add_rms_norm(x, out, vectors["norm2"])
            return residual + linears["fc2"](swiglu(linears["fc1"](normed)))
        out = linears["proj"](self.attention(linears["qkv"](layer_norm(x, vectors["norm1"], vectors["shift1"]))))
        residual, normed = add_layer_norm(x, out, vectors["proj"], vectors["norm2"], vectors["shift2"])
        return add_bias(residual, linears["fc2"](bias_relu(linears["fc1"](normed), vectors["fc1"])), vectors["fc2"])


def block_of(model: Model, linear: BlockMaker) -> torch.nn.Module:
    """A block of others as it is, or `Block` with these linears."""
    if isinstance(linear, type) and issubclass(linear, TeBlock):
        return linear(model, SEQUENCE)
    return Block(model, cast("LinearMaker | dict[str, LinearMaker]", linear))


def accumulate_in_fp32(module: torch.nn.Module) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Each gradient is added to an fp32 sum as soon as it is there and then dropped: what a bf16 engine does."""
    sums: dict[torch.nn.Parameter, torch.Tensor] = {}

    def add(parameter):
        sums[parameter].add_(parameter.grad)
        parameter.grad = None

    for parameter in module.parameters():
        sums[parameter] = torch.zeros(parameter.shape, device="cuda")
        parameter.register_post_accumulate_grad_hook(add)
    return sums


class Stack:
    """Blocks one after the other, with what is timed: a training micro-batch and a forward pass."""

    def __init__(
        self,
        model: Model,
        linear: BlockMaker,
        blocks: int,
        tokens: int,
        accumulate: str,
    ):
        self.blocks = torch.nn.Sequential(*(block_of(model, linear) for _ in range(blocks)))
        self.x = torch.randn(tokens, model.hidden, device="cuda", dtype=DTYPE, requires_grad=True)
        self.dy = torch.randn(tokens, model.hidden, device="cuda", dtype=DTYPE) * 1e-3
        self.accumulate = accumulate
        self.sums = accumulate_in_fp32(self.blocks) if accumulate == "fp32" else {}

    def train(self) -> None:
        """Forward and backward of one micro-batch, gradients accumulated."""
        self.x.grad = None
        if self.accumulate == "none":
            self.blocks.zero_grad(set_to_none=True)
        self.blocks(self.x).backward(self.dy)

    @torch.no_grad()
    def forward(self) -> None:
        self.blocks(self.x)


def captured(function, warmups: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call: times then hold what the GPU does, not how fast Python asks for it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmups):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph
