"""Linears of a decoder: packed ones on the backend's forward product, dense ones on torch's.

T tokens, N out, K in, C kept per row, R adapter rank.   Y = X (W^R)^T + (1/R) (X L) R + b
"""

from collections.abc import Mapping

import torch

from slope_megatron.ops.backend import ForwardProduct, Product, build_forward
from slope_megatron.ops.operands import low_rank
from slope_megatron.ops.operands.reference import ForwardOnly


class Linear(torch.nn.Module):
    """A product with adapters and bias around it."""

    def __init__(
        self,
        operands: ForwardProduct,
        bias: torch.Tensor | None,
        adapters: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        super().__init__()
        if bias is not None and hasattr(operands, "with_bias"):
            # The product's epilogue adds it.
            operands, bias = operands.with_bias(bias), None
        self.operands, self.bias, self.adapters = operands, bias, adapters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TK = x.flatten(0, -2)
        if self.adapters is None:
            y_TN = self.operands.forward(x_TK)
        else:
            adapter_l_RK, adapter_r_NR = self.adapters
            scale = 1.0 / adapter_l_RK.shape[0]
            y_TN, _ = low_rank.product(self.operands, Product.FORWARD, x_TK, adapter_l_RK, adapter_r_NR, scale)
        y = y_TN.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class SparseLinear(Linear):
    """One packed linear. What the backend derives from values and pattern is all that stays in memory."""

    def __init__(self, values_NC, pattern_bits, bias=None, adapters=None, backend: str = "auto"):
        super().__init__(build_forward(backend, values_NC, pattern_bits), bias, adapters)
        self.dense_bytes = pattern_bits.numel() * 8 * values_NC.element_size()
        self.packed_bytes = values_NC.nbytes + pattern_bits.nbytes


def build_linear(tensors: Mapping[str, torch.Tensor], name: str, load, backend: str) -> torch.nn.Module:
    """The linear of a canonical name: packed if it has a pattern, else dense (a baseline's, with its zeros stored).

    Args:
        load: brings a tensor to where the model computes (device, dtype).
    """

    def get(leaf: str) -> torch.Tensor:
        return load(tensors[f"{name}.{leaf}"])

    def has(leaf: str) -> bool:
        return f"{name}.{leaf}" in tensors

    bias = get("bias") if has("bias") else None
    adapters = (get("adapter_l"), get("adapter_r")) if has("adapter_l") else None
    if has("weight_pattern"):
        return SparseLinear(get("weight"), get("weight_pattern"), bias, adapters, backend)
    return Linear(ForwardOnly(get("weight")), bias, adapters)
