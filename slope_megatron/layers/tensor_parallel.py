"""TensorParallel: what a pruned linear needs to be one of Megatron's, column- or row-parallel.

The product and the state are `PrunedLinear`'s; here are Megatron's hooks, marks and checkpoints.
"""

import functools

import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.communication import TensorParallelCommunication
from slope_megatron.layers.marks import mark
from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.layers.sharded import sharded_tensors
from slope_megatron.layers.token_buckets import in_buckets


class TensorParallel(PrunedLinear):
    """Mixed into Megatron's linears, before `PackedWeight` or `MaskedWeight`."""

    config: ModelParallelConfig
    tp_group: dist.ProcessGroup
    # Megatron-DeepSpeed's linears do not say.
    is_expert: bool = False

    @classmethod
    def configured(cls, slope: SlopeConfig) -> type:
        """This class with `slope` bound: what Megatron's layer specs take, some of which only call a class."""
        return type(cls.__name__, (cls,), {"__init__": functools.partialmethod(cls.__init__, slope=slope)})

    def init_parallel(self, partition_dim: int, stride: int) -> None:
        """Mark what tensor parallelism cuts; called once, at the end of the constructor.

        Args:
            partition_dim: axis of the weight that tensor parallelism cuts: 0 (column) or 1 (row).
        """
        self.partition_dim = partition_dim
        self.replicated_adapter = "l" if partition_dim == 0 else "r"
        cut = [self.weight]
        if self.slope.rank:
            cut.append(self.adapter_r if partition_dim == 0 else self.adapter_l)
            for factor in (self.adapter_l, self.adapter_r):
                # False: an expert's, whose gradient is summed over the ranks that hold this expert alone.
                mark(factor, allreduce=getattr(self.weight, "allreduce", True))
        for parameter in cut:
            # core 0.20 has marked the weight, and asserts that nobody did.
            if not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, partition_dim, stride)
        if self.config.perform_initialization:
            # By Megatron, in the constructor.
            self.mark_present("weight")

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """For Megatron's checkpoints: each tensor with the axis along which it is cut."""
        return sharded_tensors(self, prefix, sharded_offsets, metadata)

    def _forward_impl(self, input, weight, *, bias, allreduce_dgrad, sequence_parallel, tp_group=None, **_):
        """Megatron's hook for the product itself; gathers and reductions around it are Megatron's own."""
        communication = TensorParallelCommunication(
            group=self.tp_group,
            sequence_parallel=sequence_parallel,
            allreduce_dgrad=allreduce_dgrad,
            replicated_adapter=self.replicated_adapter,
        )
        multiply = in_buckets(self.multiply) if self.is_expert else self.multiply
        return multiply(input, weight, bias, communication)


def refuse_unsupported(**asked) -> None:
    """Options of Megatron's linears that a pruned weight cannot serve yet: refused with the reason, never ignored."""
    for name, value in asked.items():
        if value:
            raise ValueError(f"{name} is {value!r}: a packed 2:4 linear does not support it; keep this linear dense")
