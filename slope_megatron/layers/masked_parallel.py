"""Megatron's parallel linears with a masked dense weight: cut, gathered and reduced like the packed ones."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.masked_weight import MaskedWeight
from slope_megatron.layers.pruned_linear import refuse_unsupported


class MaskedColumnParallelLinear(MaskedWeight, ColumnParallelLinear):
    """Megatron's `ColumnParallelLinear` whose weight is masked; `slope` is the one argument more."""

    def __init__(self, *arguments, slope: SlopeConfig, config, stride: int = 1, **keywords):
        refuse_unsupported(config, skip_weight_param_allocation=keywords.get("skip_weight_param_allocation"))
        super().__init__(*arguments, config=config, stride=stride, **keywords)
        self.gated = config.gated_linear_unit and keywords.get("tp_comm_buffer_name") == "fc1"
        self.init_masked(slope, partition_dim=0, stride=stride)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Weight, mask and R cut along axis 0; L replicated."""
        sharded = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {name: 0 for name in ("weight", "weight_mask", "bias", "adapter_r")},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:
            # Megatron's MLP splits weight and bias into gate and up; these are ours.
            for name in ("weight_mask", "adapter_r"):
                if f"{prefix}{name}" in sharded:
                    tensor = sharded[f"{prefix}{name}"]
                    sharded[f"{prefix}{name}"] = apply_swiglu_sharded_factory(tensor, sharded_offsets)
        return sharded


class MaskedRowParallelLinear(MaskedWeight, RowParallelLinear):
    """Megatron's `RowParallelLinear` whose weight is masked; `slope` is the one argument more."""

    def __init__(self, *arguments, slope: SlopeConfig, config, stride: int = 1, **keywords):
        refuse_unsupported(config)
        super().__init__(*arguments, config=config, stride=stride, **keywords)
        self.init_masked(slope, partition_dim=1, stride=stride)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Weight, mask and L cut along axis 1; R and the bias replicated."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {name: 1 for name in ("weight", "weight_mask", "adapter_l")},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
