"""What tensor and sequence parallelism move around a linear: the input's gather and the reduction of its gradient."""

import dataclasses

import torch
import torch.distributed as dist

from slope_megatron.linear import Ready


@dataclasses.dataclass
class InFlight:
    """A collective that was started, and the tensor that it fills."""

    work: dist.Work
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.tensor


@dataclasses.dataclass(frozen=True)
class TensorParallelCommunication:
    """Collectives of one linear. The sequence is axis 0, as everywhere in Megatron.

    Args:
        group: the tensor-parallel ranks.
        sequence_parallel: the input is this rank's part of the sequence; dX goes back as parts (reduce-scatter).
        allreduce_dgrad: the input is whole on every rank; dX is summed (all-reduce).
        replicated_adapter: which factor every rank holds whole, "l" or "r"; its gradient is summed.
    """

    group: dist.ProcessGroup
    sequence_parallel: bool
    allreduce_dgrad: bool
    replicated_adapter: str

    def gather_input(self, x: torch.Tensor):
        """`[s/TP, ...]` -> `[s, ...]` under sequence parallelism, else `x` itself."""
        if not self.sequence_parallel:
            return Ready(x)
        whole = x.new_empty((x.shape[0] * self.group.size(), *x.shape[1:]))
        return InFlight(dist.all_gather_into_tensor(whole, x.contiguous(), group=self.group, async_op=True), whole)

    def reduce_input_gradient(self, dx: torch.Tensor):
        """The sum of `dx` over the ranks: all of it, or this rank's part of the sequence."""
        if self.sequence_parallel:
            part = dx.new_empty((dx.shape[0] // self.group.size(), *dx.shape[1:]))
            return InFlight(dist.reduce_scatter_tensor(part, dx.contiguous(), group=self.group, async_op=True), part)
        return self._all_reduce(dx) if self.allreduce_dgrad else Ready(dx)

    def reduce_adapter_gradients(self, dl: torch.Tensor, dr: torch.Tensor):
        """The replicated factor's gradient summed over the ranks, the other one as it is: `(dl, dr)`, both pending."""
        if self.group.size() == 1:
            return Ready(dl), Ready(dr)
        if self.replicated_adapter == "l":
            return self._all_reduce(dl), Ready(dr)
        return Ready(dl), self._all_reduce(dr)

    def _all_reduce(self, tensor: torch.Tensor) -> InFlight:
        tensor = tensor.contiguous()
        return InFlight(dist.all_reduce(tensor, group=self.group, async_op=True), tensor)
