"""Measuring a product whose sparse operand is a 16-bit weight, forward or dgrad; see `measure`.

T tokens, R rows and S columns of the operand.
"""

import dataclasses

import torch

from slope_kernels import cusparselt, cusparselt_library
from slope_megatron.ops.autotune.trials import random_bits
from slope_megatron.ops.choices import Key, Product
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.ops.operands.protocol import WeightPatterns


@dataclasses.dataclass
class WeightTrial:
    """Random data of one product: X, the operand by its number of tiles, room for Y, the dense weight and its Y."""

    key: Key
    x_TS: torch.Tensor
    row_bits: torch.Tensor
    operands: dict[int, torch.Tensor]
    y_TR: torch.Tensor
    dense: torch.Tensor
    expected_TR: torch.Tensor

    def poison(self) -> None:
        self.y_TR.fill_(float("nan"))

    def dense_product(self) -> torch.Tensor:
        """Dgrad keeps the dense weight as [S, R], the others as [R, S]: how each reads its own."""
        weight = self.dense if self.key.product is Product.DGRAD else self.dense.t()
        return torch.mm(self.x_TS, weight, out=self.y_TR)

    def operand(self, tiles: int) -> torch.Tensor:
        if tiles not in self.operands:
            self.operands[tiles] = layout.retile(self.operands[1], self.key.rows, self.key.columns, 1, tiles)
        return self.operands[tiles]


def trial_of(key: Key, device: torch.device) -> WeightTrial:
    """Fresh random data; the operand in one tile, without cuSPARSELt its values alone."""
    row_bits = random_bits(key.rows, key.columns, device)
    values = torch.randn(key.rows, key.columns // 2, device=device, dtype=key.dtype)
    operand = torch.empty(layout.operand_bytes(key.rows, key.columns), dtype=torch.uint8, device=device)
    layout.values_of(operand, key.rows, key.columns, 1, key.dtype).copy_(values[None])
    if cusparselt_library.unsupported() is None:
        metadata = WeightPatterns.of(values, row_bits, None).metadata(Product.FORWARD)
        layout.metadata_of(operand, key.rows, key.columns, 1).copy_(metadata[None])
    dense = products.unpack_kept(values, row_bits)
    if key.product is Product.DGRAD:
        dense = dense.t().contiguous()
    tokens = cusparselt.padded_tokens(key.tokens)
    x = torch.randn(tokens, key.columns, device=device, dtype=key.dtype)
    y = torch.empty(tokens, key.rows, device=device, dtype=key.dtype)
    trial = WeightTrial(key, x, row_bits, {1: operand}, y, dense, y)
    trial.expected_TR = trial.dense_product().clone()
    return trial
