"""SlopeColumnParallelLinear: Y = X W^T with W's rows (outputs) cut over the tensor-parallel ranks.

forward   Y_i  = X (W^R_i)^T + (1/R) (X L) R_i        X whole, or gathered along the sequence
dgrad     dX   = sum_i dY_i W^{R,C}_i + ...           all-reduce (or reduce-scatter), overlapped with wgrad
wgrad     dW_i = dY_i^T X, packed
L is replicated: its gradient is summed over the ranks. R is cut like W.
"""

from megatron.core.tensor_parallel import ColumnParallelLinear

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.packed_weight import PackedWeight
from slope_megatron.layers.tensor_parallel import TensorParallel, refuse_unsupported


class SlopeColumnParallelLinear(TensorParallel, PackedWeight, ColumnParallelLinear):
    """Megatron's `ColumnParallelLinear` with packed N:M weights; `slope` is the one argument more."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        slope: SlopeConfig,
        config,
        init_method,
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        skip_bias_add: bool = False,
        skip_weight_param_allocation: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        disable_grad_reduce: bool = False,
        tp_group=None,
        name: str | None = None,  # from core 0.18 on, to be told apart in logs
        pg_collection=None,  # from core 0.20 on: of all its groups, `tp_group` is the one that counts here
        **unsupported,
    ):
        refuse_unsupported(skip_weight_param_allocation=skip_weight_param_allocation, **unsupported)
        # Built `input_size * n / m` wide, the parent allocates the packed weight itself; a dense one never exists.
        super().__init__(
            input_size * slope.n // slope.m,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            gather_output=gather_output,
            stride=stride,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_comm_buffer_name=tp_comm_buffer_name,
            disable_grad_reduce=disable_grad_reduce,
            tp_group=tp_group,
        )
        self.input_size = input_size
        self.gated = config.gated_linear_unit and tp_comm_buffer_name == "fc1"
        self.init_packed(slope)
        self.init_parallel(partition_dim=0, stride=stride)
