"""A pruned layer's products beside the plain oracle of its present values and patterns. T tokens, N out, K in."""

import dataclasses

import torch
from torch.func import functional_call

from helpers.numerics import relative_error
from slope_megatron.sparsity import reference
from slope_megatron.sparsity.packing import pack, unpack, unpack_bits

IN, OUT, TOKENS = 128, 64, 32
# What a stale operand is off by is more than 0.1 in all cases.
BOUND = {torch.float64: 1e-12, torch.bfloat16: 1e-2}


def build(kind: str, backend: str = "reference", dtype=torch.float64, device: str = "cpu"):
    """A layer on this rank alone, filled: "packed", or the baseline "masked"."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slope_megatron.config import SlopeConfig
    from slope_megatron.layers.column_parallel import SlopeColumnParallelLinear
    from slope_megatron.layers.masked_parallel import MaskedColumnParallelLinear
    from slope_megatron.layers.packed_weight import Region

    config = TransformerConfig(
        num_layers=1,
        hidden_size=IN,
        num_attention_heads=4,
        params_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    slope = SlopeConfig(backend=backend, **({} if kind == "packed" else {"method": "fst"}))
    layer_class = SlopeColumnParallelLinear if kind == "packed" else MaskedColumnParallelLinear
    layer = layer_class(IN, OUT, slope=slope, config=config, init_method=None, bias=False, skip_bias_add=False)
    if kind == "packed":
        layer.init_weight(11, Region("w", range(OUT), 0, 0, IN), std=1.0)
        layer.update_column_pattern()
    else:
        layer.weight.data.copy_(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(11)))
        layer.update_mask()
        # Its estimate of dY is no matter here.
        layer.gradient_rng = lambda: None
    return layer.to(device)


def random(*shape: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(like.device, like.dtype)


@dataclasses.dataclass
class Subject:
    """A layer under test, and one batch for it."""

    layer: torch.nn.Module

    def __post_init__(self):
        self.x = random(TOKENS, IN, seed=1, like=self.layer.weight)
        self.dy = random(TOKENS, OUT, seed=2, like=self.layer.weight)

    def oracle(self, weight: torch.Tensor):
        """Y, dX and dW of these values under the layer's present patterns; dW has the shape of `weight`."""
        layer, x, dy = self.layer, self.x.double(), self.dy.double()
        weight = weight.detach().double()
        if hasattr(layer, "weight_mask"):
            mask = unpack_bits(layer.weight_mask)
            return x @ (weight * mask).t(), dy @ (weight * mask), dy.t() @ x
        row = unpack_bits(layer.weight_pattern)
        column, dense = unpack(unpack_bits(layer.weight_column), row), unpack(weight, row)
        expected = reference.backward(x, dy, dense, row, column)
        return reference.forward(x, dense, row), expected.x_TK, pack(expected.weight_NK, row)

    def call(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Y, with another weight in the parameter's place or with its own."""
        if weight is None:
            return self.layer(x)[0]
        return functional_call(self.layer, {"weight": weight}, (x,))[0]

    def train(self, weight: torch.Tensor | None = None, call=None) -> list[float]:
        """Relative errors of Y, dX and dW; the weight's gradient stays where it is."""
        leaf, x = self.layer.weight if weight is None else weight, self.x.clone().requires_grad_()
        leaf.grad = None
        y = (call or self.call)(x, weight)
        y.backward(self.dy)
        return self.errors((y, x.grad, leaf.grad), leaf)

    def evaluate(self, weight: torch.Tensor | None = None) -> list[float]:
        """The relative error of Y in evaluation."""
        return self.errors((self.evaluate_y(weight),), self.layer.weight if weight is None else weight)

    @torch.no_grad()
    def evaluate_y(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        self.layer.eval()
        y = self.call(self.x, weight)
        self.layer.train()
        return y

    def errors(self, found, weight: torch.Tensor) -> list[float]:
        return [relative_error(one, expected) for one, expected in zip(found, self.oracle(weight), strict=False)]
