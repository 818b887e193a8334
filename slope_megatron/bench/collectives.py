"""Bytes that one rank sends through collectives: counted as they are called, and by formula.

A ring over r ranks, S bytes of the whole tensor (the gathered one, the one before it is scattered):

    all-gather, reduce-scatter    (r - 1) / r S
    all-reduce                    2 (r - 1) / r S
    send                          S
    broadcast                     S, by its source alone
"""

import collections
import contextlib

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# torch's operator -> its kind and the argument that is the whole tensor.
KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "send": ("send", 0),
}


def ring_share(kind: str, ranks: int) -> float:
    """Bytes sent for each byte of the whole tensor."""
    once = (ranks - 1) / ranks
    return {"all-reduce": 2 * once, "all-gather": once, "reduce-scatter": once, "send": 1.0}[kind]


def size_of(value) -> int:
    """Bytes of a tensor, or of all tensors of nested lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value))


def group_of(argument) -> dist.ProcessGroup | None:
    """The process group that an operator was given, if the argument is one."""
    if isinstance(argument, torch.ScriptObject):
        with contextlib.suppress(TypeError, RuntimeError):
            return dist.ProcessGroup.unbox(argument)
    return None


class Counted(TorchDispatchMode):
    """Counts while it is entered, also what autograd's threads call.

    Args:
        groups: names of groups; another group of the same ranks counts as the same.

    Attributes:
        sent: bytes by kind and group's name.
    """

    def __init__(self, groups: dict[str, dist.ProcessGroup]):
        super().__init__()
        self.names = {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items()}
        self.sent: dict[tuple[str, str], float] = collections.defaultdict(float)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.note(function._opname, args)
        return function(*args, **(kwargs or {}))

    def note(self, name: str, args) -> None:
        if name not in KINDS:
            return
        kind, whole = KINDS[name]
        group = next(group for group in map(group_of, args) if group is not None)
        where = self.names.get(tuple(dist.get_process_group_ranks(group)), "other")
        self.sent[kind, where] += size_of(args[whole]) * ring_share(kind, group.size())

    def total(self, group: str) -> float:
        """Bytes that this rank has sent within a group."""
        return sum(count for (_, where), count in self.sent.items() if where == group)
