"""ZeRO-1's gradients in bf16 training: summed in fp32 over the micro-batches, then over the replicas, then used.

d replicas, P parameters of this rank, in flat groups that ZeRO cuts into d equal partitions.

DeepSpeed 0.19's bf16 optimizer copies the fp32 sums together, rounds them to bf16, all-reduces all of them to every
replica and copies them back, although each replica updates its own partition alone. Here each group is reduce-scattered
where it lies: a replica gets the sum of its own partition, and

    sent by a rank      (d - 1) / d x 4 P bytes in fp32, 2 P in bf16 (DeepSpeed: 4 P, in bf16)
    norm and clipping   of the own partition, P / d numbers (DeepSpeed: P), one more sum over the replicas

so that exact fp32 sums cost what DeepSpeed's rounded ones do. What of a group is not the replica's own keeps its local
sums until they are zeroed after the update; nobody reads it.

The update waits for the GPU nowhere: the norm is read together with the loss (`skipping`), and kernels are asked for by
the group, not by the parameter.
"""

import functools
import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.layers.marks import mark
from slope_megatron.ops.update import accumulate_
from slope_megatron.training.optim import one_pass
from slope_megatron.training.parallel import is_counted_here
from slope_megatron.training.zero import partitions

# Elements that are converted and sent at once, and again as many while the ones before travel.
ELEMENTS_AT_ONCE = 2**26
# As in DeepSpeed's and torch's clipping.
EPSILON = 1e-6


class Bf16Gradients:
    """Replaces accumulation, reduction, norm and update in DeepSpeed's bf16 optimizer.

    Args:
        optimizer: DeepSpeed's, of ZeRO-1 with fp32 accumulation.
        members: the parameters of each group by its name, as they were before `deepspeed.initialize`.
        sent: the type in which the sums travel.
    """

    def __init__(self, optimizer, members: dict[str, list[torch.nn.Parameter]], sent: torch.dtype):
        self.optimizer, self.sent = optimizer, sent
        self.group = parallel_state.get_data_parallel_group()
        for parameters, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, total in zip(parameters, sums, strict=True):
                # Pruned linears add their gradient to it themselves.
                mark(parameter, _hp_grad=total, gradient_sum=total.view(parameter.shape))
        optimizer._update_hp_grad = functools.partial(add_gradient, optimizer)
        # Called after `step`, which has zeroed the fp32 sums: DeepSpeed's own would zero them once more.
        optimizer.zero_grad = functools.partial(optimizer.clear_lp_grads, set_to_none=True)
        flats = optimizer.fp32_groups_gradient_flat_partition
        # A norm needs at least one number.
        self.measured, self.copies = [flats[0].new_zeros(1)], [flats[0].new_zeros(1)]
        for flat, segments in zip(flats, partitions.segments(optimizer, members), strict=True):
            for segment in segments:
                views = self.measured if is_measured_here(segment.parameter) else self.copies
                if segment.numel:
                    views.append(flat.narrow(0, segment.start, segment.numel))

    def reduce(self) -> None:
        """The mean over the replicas, into each replica's own partition."""
        if self.group.size() == 1:
            return
        wholes, owns = self.optimizer.fp32_groups_gradients_flat, self.optimizer.fp32_groups_gradient_flat_partition
        for whole, own in zip(wholes, owns, strict=True):
            if self.sent == whole.dtype:
                # In place: the own partition is a part of the whole.
                dist.reduce_scatter_tensor(own, whole, group=self.group)
            else:
                reduce_converted(own, whole, self.sent, self.group)
            own.div_(self.group.size())

    def norm(self) -> torch.Tensor:
        """Of the reduced gradients of the whole model, every number counted once; collective over all ranks."""
        squares = torch.stack(torch._foreach_norm(self.measured)).square().sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    def copies_are_finite(self) -> torch.Tensor:
        """Whether the gradients are finite that this rank uses and `norm` does not see: other ranks' copies are there.

        A bool on the device.
        """
        return torch.nn.utils.get_total_norm(self.copies, norm_type=math.inf).isfinite()

    @torch.no_grad()
    def step(self, norm: float, *, skip: bool) -> None:
        """What DeepSpeed's `step` does with the reduced gradients: clip, update, round the weights, gather them.

        Args:
            norm: what `norm` has found.
            skip: nothing is updated.
        """
        optimizer, gradients = self.optimizer, self.optimizer.fp32_groups_gradient_flat_partition
        optimizer.overflow, optimizer._global_grad_norm = skip, math.inf if skip else norm
        if not skip:
            # In fp32, as DeepSpeed computes it on the device.
            coefficient = float(optimizer.clip_grad / (torch.tensor(norm) + EPSILON))
            self.update(gradients, coefficient if 0 < coefficient < 1 else 1.0)
            optimizer._lazy_init_hp_params_optimizer_state()
        torch._foreach_zero_(optimizer.fp32_groups_gradients_flat)

    def update(self, gradients: list[torch.Tensor], coefficient: float) -> None:
        """Masters and weights, from gradients that clipping multiplies by `coefficient`."""
        optimizer = self.optimizer
        masters = optimizer.fp32_groups_flat_partition
        if one_pass.applies(optimizer.optimizer):
            rank, parts = self.group.rank(), optimizer.bf16_partitioned_groups
            own = [partition[rank] for partition in parts]
            one_pass.update(optimizer.optimizer, masters, gradients, own, coefficient)
            for whole, part in zip(optimizer.bf16_groups_flat, own, strict=True):
                if self.group.size() > 1:
                    dist.all_gather_into_tensor(whole, part, group=self.group)
            return
        if coefficient != 1.0:
            torch._foreach_mul_(gradients, coefficient)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        optimizer.optimizer.step()
        optimizer.update_lp_params()


def is_measured_here(parameter: torch.nn.Parameter) -> bool:
    """Once over all stages, too: a tied copy where its original is."""
    return is_counted_here(parameter) and not getattr(parameter, "ds_pipe_replicated", False)


def reduce_converted(own: torch.Tensor, whole: torch.Tensor, sent: torch.dtype, group: dist.ProcessGroup) -> None:
    """Reduce-scatter in another type, piece by piece: while one travels, the next is converted."""
    replicas = group.size()
    table = whole.view(replicas, -1)
    step = max(1, ELEMENTS_AT_ONCE // replicas)
    travelling: tuple | None = None

    def arrive(work, arrived: torch.Tensor, start: int) -> None:
        work.wait()
        own.narrow(0, start, arrived.numel()).copy_(arrived)

    for start in range(0, table.shape[1], step):
        outgoing = table[:, start : start + step].to(sent).flatten()
        arrived = outgoing.new_empty(outgoing.numel() // replicas)
        work = dist.reduce_scatter_tensor(arrived, outgoing, group=group, async_op=True)
        if travelling:
            arrive(*travelling)
        travelling = (work, arrived, start)
    if travelling:
        arrive(*travelling)


def add_gradient(optimizer, parameter: torch.nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
    """fp32 sum += bf16 gradient, as DeepSpeed 0.19's bf16 optimizer does it, whose private method this stands for.

    It first makes an fp32 copy of the gradient: 18 bytes an element are moved, and 10 by an addition of mixed types,
    which rounds the same. And it keeps the gradient's memory, zeroed, for the next backward to add to: here autograd
    gives that memory back, 2 bytes an element.
    """
    if parameter.grad is None:
        return
    total = optimizer.fp32_groups_gradients[group][index]
    accumulate_(total, parameter.grad)
    if clear_lp_grads:
        parameter.grad = None
