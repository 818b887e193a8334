"""Linears of a decoder: packed ones on the backend's forward product, dense ones on torch's.

T tokens, N out, K in, C kept per row, R adapter rank.   Y = X (W^R)^T + (1/R) (X L) R + b
"""

from collections.abc import Callable, Mapping

import torch

from slope_megatron.ops.backend import build_operands


class Linear(torch.nn.Module):
    """A product with adapters and bias around it.

    Args:
        product: X `[T, K]` -> X W^T `[T, N]`.
    """

    def __init__(
        self,
        product: Callable[[torch.Tensor], torch.Tensor],
        bias: torch.Tensor | None,
        adapters: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        super().__init__()
        self.product, self.bias, self.adapters = product, bias, adapters

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
        super().__init__(build_operands(backend, values_NC, pattern_bits).forward, bias, adapters)
        self.dense_bytes = pattern_bits.numel() * 8 * values_NC.element_size()
        self.packed_bytes = values_NC.nbytes + pattern_bits.nbytes


def build_linear(tensors: Mapping[str, torch.Tensor], name: str, place, backend: str) -> torch.nn.Module:
    """The linear of a canonical name: packed if it has a pattern, else dense (a baseline's, with its zeros stored).

    Args:
        place: puts a tensor where the model computes (device, dtype).
    """

    def get(leaf: str) -> torch.Tensor | None:
        return place(tensors[f"{name}.{leaf}"]) if f"{name}.{leaf}" in tensors else None

    weight, bias, pattern = get("weight"), get("bias"), get("weight_pattern")
    adapter_l = get("adapter_l")
    adapters = None if adapter_l is None else (adapter_l, get("adapter_r"))
    if pattern is None:
        return Linear(lambda x_TK: x_TK @ weight.t(), bias, adapters)
    return SparseLinear(weight, pattern, bias, adapters, backend)
