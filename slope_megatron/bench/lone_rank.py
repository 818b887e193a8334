"""One rank of a tensor-parallel group whose other ranks are not there: its shapes and kernels without collectives.

torch's `fake` process groups return at once: an all-reduce leaves its tensor as it is, and an all-gather copies this
rank's part to every other's slot. A reduce-scatter of theirs writes nothing in some versions of torch, and what
memory held before may be no numbers: here it copies this rank's part, unreduced. Losses mean nothing; times lack the
collectives and have these copies.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers, mappings
from torch.testing._internal.distributed.fake_pg import FakeStore


class Done:
    """The handle of a collective that is over."""

    def wait(self, timeout=None) -> bool:
        return True


def take_own_part(output, input, op=None, group=None, async_op=False) -> Done | None:
    """Instead of `torch.distributed.reduce_scatter_tensor`."""
    output.copy_(input.view(-1, *output.shape)[dist.get_rank(group)])
    return Done() if async_op else None


@contextlib.contextmanager
def rank_0_of(ranks: int) -> Iterator[None]:
    """Make this process rank 0 of so many, before groups are formed; 1: nothing is faked."""
    if ranks == 1:
        yield
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    # Gloo's groups, which Megatron forms beside the others, would wait for the ranks that are not there.
    form = functools.partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    # Megatron keeps the reduce-scatter under a name of its own.
    with (
        mock.patch.object(parallel_state, "initialize_model_parallel", form),
        mock.patch.object(dist, "reduce_scatter_tensor", take_own_part),
        mock.patch.object(layers, "dist_reduce_scatter_func", take_own_part),
        mock.patch.object(mappings, "dist_reduce_scatter_func", take_own_part),
    ):
        yield
