"""A bias added by the forward product's epilogue, and its gradient.

T tokens, N out, K in.   Y = X (W^R)^T + b,   db = sum of dY over the tokens
"""

import dataclasses
from typing import Any

import torch

from slope_megatron.sparsity.token_draws import TokenDraws


@dataclasses.dataclass(frozen=True)
class BiasedOperands:
    """Operands whose forward adds a bias on the way out; see `bias_gradient` for the bias's own gradient."""

    operands: Any
    bias_N: torch.Tensor

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.operands.forward(x_TK, self.bias_N.detach())

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        return self.operands.dgrad(dy_TN)

    def forward_add(self, x_TK: torch.Tensor, y_TN: torch.Tensor) -> torch.Tensor:
        return self.operands.forward_add(x_TK, y_TN, self.bias_N.detach())

    def dgrad_add(self, dy_TN: torch.Tensor, dx_TK: torch.Tensor) -> torch.Tensor:
        return self.operands.dgrad_add(dy_TN, dx_TK)

    def joined_product(self, kind: str, x_TS, down_PS, up_RP, scale: float):
        bias_N = self.bias_N.detach() if kind == "forward" else None
        return self.operands.joined_product(kind, x_TS, down_PS, up_RP, scale, bias_N)

    @property
    def unbiased(self):
        """Where the buffers and the choices are."""
        return self.operands

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, draws: TokenDraws | None = None) -> torch.Tensor:
        return self.operands.wgrad(dy_TN, x_TK, draws)


class BiasGradient(torch.autograd.Function):
    """Y, to which an epilogue has added the bias already: forward Y, dY = dY, db = sum of dY over the tokens."""

    @staticmethod
    def forward(ctx, y_TN, bias_N):
        return y_TN.view_as(y_TN)

    @staticmethod
    def backward(ctx, dy_TN):
        return dy_TN, dy_TN.flatten(0, -2).sum(0)


def bias_gradient(y_TN: torch.Tensor, bias_N: torch.Tensor) -> torch.Tensor:
    """Connects a bias that an epilogue has added to its gradient."""
    return BiasGradient.apply(y_TN, bias_N)
