"""A bias added by the forward product's epilogue, and its gradient.

T tokens, N out, K in.   Y = X (W^R)^T + b,   db = sum of dY over the tokens
"""

import dataclasses
from typing import Any

import torch

from slope_megatron.ops.choices import Product
from slope_megatron.sparsity.mvue_rng import MvueRng


@dataclasses.dataclass(frozen=True)
class WithBias:
    """Operands whose forward adds a bias on the way out; see `bias_gradient` for the bias's own gradient."""

    # PackedOperands, or what else has `product` with a bias.
    inner: Any
    bias_N: torch.Tensor

    def product(self, product: Product, x_TS: torch.Tensor) -> torch.Tensor:
        return self.inner.product(product, x_TS, self.bias_of(product))

    def add(self, product: Product, x_TS: torch.Tensor, y_TR: torch.Tensor) -> torch.Tensor:
        return self.inner.add(product, x_TS, y_TR, self.bias_of(product))

    def bias_of(self, product: Product) -> torch.Tensor | None:
        """The bias that a product adds."""
        return self.bias_N.detach() if product is Product.FORWARD else None

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.product(Product.FORWARD, x_TK)

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        return self.product(Product.DGRAD, dy_TN)

    def wgrad(
        self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None, total: torch.Tensor | None = None
    ):
        return self.inner.wgrad(dy_TN, x_TK, rng, total)

    def __getattr__(self, name: str) -> Any:
        # What some operands have. Any other name is no one's, `inner` included, while a copy is made.
        if name not in ("rounded_input", "wgrad_of_rounded"):
            raise AttributeError(name)
        return getattr(self.inner, name)


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
