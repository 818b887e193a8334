"""Megatron's parallel linears with a masked dense weight: cut, gathered and reduced like the packed ones."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.masked_weight import MaskedWeight
from slope_megatron.layers.tensor_parallel import TensorParallel, refuse_unsupported


class MaskedColumnParallelLinear(TensorParallel, MaskedWeight, ColumnParallelLinear):
    """Megatron's `ColumnParallelLinear` whose weight is masked; `slope` is the one argument more."""

    def __init__(self, *arguments, slope: SlopeConfig, config, stride: int = 1, **keywords):
        refuse_unsupported(skip_weight_param_allocation=keywords.get("skip_weight_param_allocation"))
        super().__init__(*arguments, config=config, stride=stride, **keywords)
        self.gated = config.gated_linear_unit and keywords.get("tp_comm_buffer_name") == "fc1"
        self.init_masked(slope)
        self.init_parallel(partition_dim=0, stride=stride)


class MaskedRowParallelLinear(TensorParallel, MaskedWeight, RowParallelLinear):
    """Megatron's `RowParallelLinear` whose weight is masked; `slope` is the one argument more."""

    def __init__(self, *arguments, slope: SlopeConfig, config, stride: int = 1, **keywords):
        super().__init__(*arguments, config=config, stride=stride, **keywords)
        self.init_masked(slope)
        self.init_parallel(partition_dim=1, stride=stride)
