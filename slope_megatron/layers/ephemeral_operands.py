"""Operands of a weight whose values are here only while its layer computes, as under ZeRO-3."""

from collections.abc import Callable

import torch

from slope_megatron.ops.backend import MvueRng, Operands, Product


class EphemeralOperands:
    """Built from the values for each use and dropped after it: in forward, and once in backward for both products.

    The memory is scratch: the next layer's operands take it. The weight must be gathered whenever a product is asked
    for, which ZeRO-3's hooks around a layer's forward and backward see to.

    Args:
        build: (weight, names of products) -> operands of its present values.
        weight: what is multiplied; the parameter itself, whose memory comes and goes.
    """

    def __init__(self, build: Callable[[torch.Tensor, tuple[Product, ...]], Operands], weight: torch.Tensor):
        self.build, self.weight = build, weight
        self.of_backward: Operands | None = None

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.build(self.weight, (Product.FORWARD,)).forward(x_TK)

    def dgrad(self, dy_TN: torch.Tensor) -> torch.Tensor:
        self.of_backward = self.build(self.weight, (Product.DGRAD, Product.WGRAD))
        return self.of_backward.dgrad(dy_TN)

    def wgrad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor, rng: MvueRng | None = None) -> torch.Tensor:
        operands = self.of_backward or self.build(self.weight, (Product.WGRAD,))
        self.of_backward = None
        return operands.wgrad(dy_TN, x_TK, rng)
