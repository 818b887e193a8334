"""Measuring wgrad of `full` mode: from dY and X to the packed gradient, by each strategy of `operands.wgrad`.

T tokens, N out, K in, C = K/2 kept per row; S is T padded to whole operand columns. The gate compares with the dense
product of the operand decoded, so it judges the kernel's metadata with the product's algorithm.
"""

import torch

from slope_kernels import cusparselt
from slope_kernels.triton.gather import gather
from slope_kernels.triton.mvue import mvue_operand
from slope_megatron.ops.autotune.trials import random_bits
from slope_megatron.ops.choices import Key
from slope_megatron.ops.custom_ops import layout
from slope_megatron.sparsity.mvue_rng import as_int32, stream_table
from slope_megatron.sparsity.operand import indices_sm90, scatter_slots

# Whole metadata blocks, decoded at once.
ROWS_AT_ONCE = 4096


class WgradTrial:
    """Random data of one product, a `trials.Trial`; its Y is the packed gradient `[N, C]`."""

    def __init__(self, key: Key, device: torch.device):
        self.key = key
        columns = cusparselt.padded_columns(key.tokens)
        self.dy_TN = torch.randn(key.tokens, key.rows, device=device, dtype=key.dtype)
        # Its own zeros past the last token: a training run's X is copied where tokens are no multiple of 64.
        self.x_SK = torch.randn(columns, key.columns, device=device, dtype=key.dtype)
        self.x_SK[key.tokens :] = 0
        self.rng_key = as_int32([1, 2]).to(device)
        self.streams = stream_table([(3, 4)], [range(key.rows)]).to(device)
        self.row_bits = random_bits(key.rows, key.columns, device)
        self.operand = torch.empty(layout.operand_bytes(key.rows, columns), dtype=torch.uint8, device=device)
        self.dw_NK = torch.empty(key.rows, key.columns, device=device, dtype=key.dtype)
        self.y_TR = torch.empty(key.rows, key.columns // 2, device=device, dtype=key.dtype)
        self.write_operand()
        torch.mm(self._decoded(columns), self.x_SK, out=self.dw_NK)
        self.keep_half()
        self.expected_TR = self.y_TR.clone()

    def poison(self) -> None:
        """The dense gradient too: half of it becomes the packed one."""
        self.dw_NK.fill_(float("nan"))
        self.y_TR.fill_(float("nan"))

    def write_operand(self, for_cutlass: bool = False) -> None:
        mvue_operand(self.dy_TN, self.rng_key, self.streams, self.operand, for_cutlass=for_cutlass)

    def keep_half(self) -> None:
        """Of the dense gradient, into the packed one."""
        gather(self.dw_NK, self.row_bits, self.y_TR)

    def _decoded(self, columns: int) -> torch.Tensor:
        """P(dY)^T `[N, S]`, read from the operand."""
        values = layout.values_of(self.operand, self.key.rows, columns, 1, self.key.dtype)[0]
        metadata = layout.metadata_of(self.operand, self.key.rows, columns, 1).view(self.key.rows // 64, -1)
        parts = []
        for part, bits in zip(values.split(ROWS_AT_ONCE), metadata.split(ROWS_AT_ONCE // 64), strict=True):
            parts.append(scatter_slots(part, indices_sm90(bits.flatten(), part.shape[0], columns // 4)))
        return torch.cat(parts)

    def dense_gradient(self) -> None:
        """The exact product, of dY as it is; a dense layer needs no more."""
        torch.mm(self.dy_TN.t(), self.x_SK[: self.key.tokens], out=self.dw_NK)

    def dense_product(self) -> torch.Tensor:
        """Its kept half."""
        self.dense_gradient()
        self.keep_half()
        return self.y_TR
