"""Packed linears in the dialect of Megatron-DeepSpeed, which ships a `megatron.core` of 2023 that shadows the wheel.

Its linears multiply by a function of their module, where those of core 0.16 have a method to override, and know neither
process groups as arguments nor sharded state dicts. So the constructors are theirs and forward is written here, around
the same product (`slope_megatron.layers.packed_weight`); the module imports only under that old core.

    column   Y_i = X (W^R_i)^T            dX summed over the ranks while dW is computed
    row      Y   = sum_i X_i (W^R_i)^T
"""

from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.packed_weight import PackedWeight
from slope_megatron.layers.tensor_parallel import TensorParallel


class PackedColumnParallelLinear(TensorParallel, PackedWeight, ColumnParallelLinear):
    """W's rows (outputs) cut over the tensor-parallel ranks; built like a dense linear that is there already."""

    def __init__(self, dense: ColumnParallelLinear, slope: SlopeConfig):
        # Told of an input n/m as wide, the parent allocates the packed weight itself.
        super().__init__(
            dense.input_size * slope.n // slope.m,
            dense.output_size,
            config=dense.config,
            init_method=dense.config.init_method,
            bias=dense.bias is not None,
            gather_output=dense.gather_output,
            skip_bias_add=dense.skip_bias_add,
        )
        self.input_size = dense.input_size
        self.tp_group = get_tensor_model_parallel_group()
        self.init_packed(slope)
        self.init_parallel(partition_dim=0, stride=1)

    def forward(self, input_):
        """`[s, b, K]` -> (`[s, b, N/TP]`, or `[s, b, N]` with `gather_output`; the bias if left to the caller)."""
        output = self._forward_impl(
            input_,
            self.weight,
            bias=None if self.skip_bias_add else self.bias,
            allreduce_dgrad=self.tp_group.size() > 1 and not self.sequence_parallel,
            sequence_parallel=self.sequence_parallel,
        )
        if self.gather_output:
            output = gather_from_tensor_model_parallel_region(output)
        return output, self.bias if self.skip_bias_add else None


class PackedRowParallelLinear(TensorParallel, PackedWeight, RowParallelLinear):
    """W's columns (inputs) cut over the tensor-parallel ranks; built like a dense linear that is there already."""

    def __init__(self, dense: RowParallelLinear, slope: SlopeConfig):
        super().__init__(
            dense.input_size * slope.n // slope.m,
            dense.output_size,
            config=dense.config,
            init_method=dense.config.output_layer_init_method,
            bias=dense.bias is not None,
            input_is_parallel=dense.input_is_parallel,
            skip_bias_add=dense.skip_bias_add,
        )
        self.input_size = dense.input_size
        self.input_size_per_partition = dense.input_size_per_partition
        self.tp_group = get_tensor_model_parallel_group()
        self.init_packed(slope)
        self.init_parallel(partition_dim=1, stride=1)

    def forward(self, input_):
        """`[s, b, K/TP]` -> (`[s, b, N]`, cut along s under sequence parallelism; the bias if left to the caller)."""
        x = input_ if self.input_is_parallel else scatter_to_tensor_model_parallel_region(input_)
        output = self._forward_impl(x, self.weight, bias=None, allreduce_dgrad=False, sequence_parallel=False)
        reduce = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else None
        output = (reduce or reduce_from_tensor_model_parallel_region)(output)
        if self.skip_bias_add:
            return output, self.bias
        return output if self.bias is None else output + self.bias, None
