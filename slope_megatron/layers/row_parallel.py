"""SlopeRowParallelLinear: Y = X W^T with W's columns (inputs) cut over the tensor-parallel ranks.

forward   Y    = sum_i [ X_i (W^R_i)^T + (1/R) (X_i L_i) R ]     one reduction for both terms
dgrad     dX_i = dY W^{R,C}_i + ...                              complete on each rank
wgrad     dW_i = dY^T X_i, packed
L is cut like W. R is replicated: its gradient is summed over the ranks.
"""

from megatron.core.tensor_parallel import RowParallelLinear

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.packed_weight import PackedWeight
from slope_megatron.layers.tensor_parallel import TensorParallel, refuse_unsupported


class SlopeRowParallelLinear(TensorParallel, PackedWeight, RowParallelLinear):
    """Megatron's `RowParallelLinear` with packed N:M weights; `slope` is the one argument more."""

    input_size_per_partition: int

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        slope: SlopeConfig,
        config,
        init_method,
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        stride: int = 1,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group=None,
        name: str | None = None,  # from core 0.18 on, to be told apart in logs
        pg_collection=None,  # from core 0.20 on: of all its groups, `tp_group` is the one that counts here
        **unsupported,
    ):
        refuse_unsupported(**unsupported)
        # Built `input_size * n / m` wide, the parent allocates the packed weight itself; a dense one never exists.
        super().__init__(
            input_size * slope.n // slope.m,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            input_is_parallel=input_is_parallel,
            skip_bias_add=skip_bias_add,
            stride=stride,
            is_expert=is_expert,
            tp_comm_buffer_name=tp_comm_buffer_name,
            tp_group=tp_group,
        )
        self.input_size = input_size
        self.input_size_per_partition = self.input_size_per_partition * slope.m // slope.n
        self.init_packed(slope)
        self.init_parallel(partition_dim=1, stride=stride)
