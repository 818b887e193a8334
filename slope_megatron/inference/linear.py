"""Linears of a decoder: packed ones on the backend's forward product, dense ones on torch's.

T tokens, N out, K in, C kept per row, R adapter rank.   Y = X (W^R)^T + (1/R) (X L) R + b
"""

from collections.abc import Mapping

import torch

from slope_megatron.ops.backend import build_operands


class Linear(torch.nn.Module):
    """What both have in common: adapters and bias."""

    def __init__(self, bias: torch.Tensor | None, adapters: tuple[torch.Tensor, torch.Tensor] | None):
        super().__init__()
        self.bias, self.adapters = bias, adapters

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """X W^T."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TK = x.flatten(0, -2)
        y_TN = self.product(x_TK)
        if self.adapters is not None:
            adapter_l_RK, adapter_r_NR = self.adapters
            rank = adapter_l_RK.shape[0]
            y_TN = torch.addmm(y_TN, x_TK @ adapter_l_RK.t(), adapter_r_NR.t(), alpha=1.0 / rank)
        y = y_TN.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class SparseLinear(Linear):
    """One packed linear. What the backend derives from values and pattern is all that stays in memory."""

    def __init__(self, values_NC, pattern_bits, bias=None, adapters=None, backend: str = "auto"):
        super().__init__(bias, adapters)
        self.operands = build_operands(backend, values_NC, pattern_bits)
        self.dense_bytes = pattern_bits.numel() * 8 * values_NC.element_size()
        self.packed_bytes = values_NC.nbytes + pattern_bits.nbytes

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.operands.forward(x_TK)


class DenseLinear(Linear):
    """A linear that was dense in training, or a baseline's, whose zeros are stored."""

    def __init__(self, weight_NK: torch.Tensor, bias: torch.Tensor | None = None, adapters=None):
        super().__init__(bias, adapters)
        self.weight = weight_NK

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        return x_TK @ self.weight.t()


def build_linear(tensors: Mapping[str, torch.Tensor], name: str, place, backend: str) -> torch.nn.Module:
    """The linear of a canonical name, packed if it has a pattern.

    Args:
        place: puts a tensor where the model computes (device, dtype).
    """

    def get(leaf: str) -> torch.Tensor | None:
        return place(tensors[f"{name}.{leaf}"]) if f"{name}.{leaf}" in tensors else None

    weight, bias, pattern = get("weight"), get("bias"), get("weight_pattern")
    adapter_l = get("adapter_l")
    adapters = None if adapter_l is None else (adapter_l, get("adapter_r"))
    if pattern is None:
        return DenseLinear(weight, bias, adapters)
    return SparseLinear(weight, pattern, bias, adapters, backend)
