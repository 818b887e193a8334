"""Measuring a product whose sparse operand is a 16-bit weight, forward or dgrad; see `measure`.

T tokens, R rows and S columns of the operand.
"""

import dataclasses

import torch

from slope_kernels import cusparselt, cusparselt_library
from slope_megatron.ops.autotune.trials import random_bits
from slope_megatron.ops.choices import Key, Product
from slope_megatron.ops.custom_ops import layout, products
from slope_megatron.sparsity.operand import slot_places
from slope_megatron.sparsity.packing import unpack_bits


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

    def candidate(self, algorithm: cusparselt.Algorithm | None, tiles: int) -> "WeightCandidate":
        return WeightCandidate(self, algorithm, tiles)

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
        if layout.probe(device, key.dtype).known_metadata:
            metadata = products.row_metadata(row_bits)
        else:
            metadata = layout.library_metadata(slot_places(unpack_bits(row_bits)), key.dtype)
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


class WeightCandidate:
    """A sparse product of a trial: one algorithm, its tiles one after the other."""

    def __init__(self, trial: WeightTrial, algorithm: cusparselt.Algorithm | None, tiles: int = 1):
        key, device = trial.key, trial.x_TS.device
        self.trial, self.tiles, self.algorithm = trial, tiles, algorithm
        product = cusparselt.Product(
            key.rows // tiles, key.columns, trial.x_TS.shape[0], key.dtype, device.index, key.rows
        )
        self.plan = cusparselt.Plan(product, algorithm)
        self.operand = trial.operand(tiles)

    def __call__(self) -> None:
        trial = self.trial
        stream = torch.cuda.current_stream(trial.x_TS.device).cuda_stream
        step = self.plan.product.rows * trial.x_TS.element_size()
        for tile in range(self.tiles):
            start = self.operand.data_ptr() + tile * self.operand.numel() // self.tiles
            self.plan.run(start, trial.x_TS.data_ptr(), trial.y_TR.data_ptr() + tile * step, stream)
