"""Measuring one product in e4m3: 2:4 with the library's algorithms, against the dense e4m3 one; see `measure`.

T tokens, R rows and S columns of the operand. The gate's right answer is a product of 16-bit tensor cores, which hold
every e4m3 value.
"""

import torch

from slope_kernels import cusparselt
from slope_megatron.ops.autotune.trials import random_bits
from slope_megatron.ops.choices import Key, Product
from slope_megatron.ops.custom_ops import float8 as float8_products
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.ops.operands.float8 import Float8Operand
from slope_megatron.ops.operands.protocol import WeightPatterns
from slope_megatron.sparsity import float8
from slope_megatron.sparsity.float8 import E4M3

# Y's type: which of the 16-bit types it is makes no difference to the time.
OUTPUT = torch.bfloat16


def random_e4m3(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return float8.quantize(torch.randn(rows, columns, device=device, dtype=OUTPUT))[0]


class Float8Trial:
    """Random data of one product, a `trials.Trial`."""

    def __init__(self, key: Key, device: torch.device):
        self.key = key
        row_bits = random_bits(key.rows, key.columns, device)
        values = random_e4m3(key.rows, key.columns // 2, device)
        self.operand = Float8Operand(WeightPatterns.of(values, row_bits, None), Product.FORWARD).buffer
        layout.values_of(self.operand, key.rows, key.columns, 1, E4M3).copy_(values[None])
        self.q_TS = random_e4m3(cusparselt.padded_tokens(key.tokens), key.columns, device)
        # One factor's scale; Y is scaled by the square, 2^-18.
        self.scale = torch.full((1,), 2.0**-9, device=device)
        dense = products.unpack_kept(values.to(OUTPUT), row_bits)
        self.expected_TR = (self.q_TS.to(OUTPUT) @ dense.t()).mul_(2.0**-18)
        self.w_RS = dense.to(E4M3)
        self.y_TR = torch.empty_like(self.expected_TR)

    def poison(self) -> None:
        self.y_TR.fill_(float("nan"))

    def dense_product(self) -> torch.Tensor:
        return float8_products.dense_mm(self.q_TS, self.w_RS, self.scale, self.scale, None, OUTPUT)
