"""SlopeLinear: `torch.nn.Linear` with packed N:M values.

N out, K in, C = K n/m kept per row.   Y = X (W^R)^T + (1/R) (X L) R + b

Weight, patterns, operands and adapters are those of `layers.packed_weight`; the product is `linear.slope_linear`.
"""

import logging

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.packed_weight import PackedWeight
from slope_megatron.layers.random_streams import RngState, RowStreams
from slope_megatron.ops.backend import choose_column_bits
from slope_megatron.sparsity import counter
from slope_megatron.sparsity.packing import pack, pack_bits
from slope_megatron.torch_layers.whole import whole

logger = logging.getLogger(__name__)


class SlopeLinear(PackedWeight):
    """
    Args:
        weight_NK: the dense weight; only its kept values are copied.
        mask_NK: bool, n True in every m.
        name: the layer's in the model: it names its random numbers.
        transposed: whether the dense layer stores `[K, N]`, as GPT-2's `Conv1D` does: what is saved and restored.
    Raises:
        ValueError: the shape cuts a group or a byte of a bitmask.
    """

    def __init__(
        self,
        weight_NK: torch.Tensor,
        mask_NK: torch.Tensor,
        bias: torch.nn.Parameter | None,
        *,
        slope: SlopeConfig,
        name: str,
        state: RngState,
        transposed: bool = False,
    ):
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self.transposed = transposed
        self.weight = torch.nn.Parameter(pack(weight_NK.detach(), mask_NK))
        # The same object: an optimizer or a tie may know it.
        self.register_parameter("bias", bias)
        self.init_packed(slope)
        self.weight_pattern.copy_(pack_bits(mask_NK))
        self.mark_present("weight", "weight_pattern")
        self.update_column_pattern()
        self.row_streams = RowStreams(state, (f"{name}.weight",), (range(self.out_features),))
        if slope.rank:
            key = counter.key_of(state.seed, f"{name}.adapter_l")
            rows, columns = range(slope.rank), range(self.in_features)
            numbers = counter.normal(key, rows, columns, self.in_features, weight_NK.device)
            with torch.no_grad():
                self.adapter_l.copy_(numbers)
        self.adapters_active = bool(slope.rank) and slope.lazy_fraction == 1.0

    @property
    def idle_adapters_get_zeros(self) -> bool:  # type: ignore[override]
        """Among several ranks: DDP waits for a gradient of every parameter."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def keeps_operands(self) -> bool:
        """Settable: False builds operands for each use and drops them, where FSDP or ZeRO-3 frees the values too."""
        return self.keep_operands

    @keeps_operands.setter
    def keeps_operands(self, keep: bool) -> None:
        self.keep_operands = keep
        self.drop_operands()

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., N]`."""
        return self.multiply(x, self.weight, self.bias)

    @torch.no_grad()
    def update_column_pattern(self) -> None:
        """As of `PackedWeight`; collective over the ranks where the values are cut over them (FSDP, ZeRO-3)."""
        with whole(self.weight) as values:
            if values is self.weight:
                super().update_column_pattern()
                return
            bits = choose_column_bits(values, self.weight_pattern, self.slope.n, self.slope.m)
        self.weight_column.copy_(bits)
        self.mark_present("weight_column")
        self.drop_operands()

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        """Also a dense weight, which is pruned by the present pattern: what `save_pretrained` wrote, for instance."""
        name = f"{prefix}weight"
        given = state_dict.get(name)
        shape = (self.out_features, self.in_features)
        dense = given is not None and tuple(given.shape) == (shape[::-1] if self.transposed else shape)
        if dense:
            weight_NK = given.t() if self.transposed else given
            mask = self.row_pattern().to(given.device)
            lost = int(((weight_NK != 0) & ~mask).sum())
            if lost:
                logger.warning("%s: %d dense values outside the pattern are dropped", name, lost)
            # The caller's state dict stays as it is.
            state_dict = {**state_dict, name: pack(weight_NK, mask)}
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if dense and f"{prefix}weight_column" not in state_dict:
            self.update_column_pattern()
        # R is zero until it trains.
        factor = state_dict.get(f"{prefix}adapter_r")
        if factor is not None and self.slope.rank:
            local = factor.to_local() if isinstance(factor, DTensor) else factor
            self.adapters_active = self.adapters_active or bool(local.any())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nm={self.slope.nm}"
        )


def sparse_linears(model: torch.nn.Module) -> dict[str, SlopeLinear]:
    """The model's sparse linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SlopeLinear)}
