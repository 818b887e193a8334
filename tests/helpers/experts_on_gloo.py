"""What experts' dispatchers of megatron-core ask of NCCL and CUDA alone, for gloo: parts of unequal size, streams."""

import contextlib

import torch
import torch.distributed as dist


class Stream:
    """Nothing is asynchronous here; an event is the same nothing."""

    cuda_stream = 0

    def __init__(self, *_, **__):
        pass

    def record_event(self, *_):
        return Stream()

    def __getattr__(self, name):
        return lambda *_, **__: 0.0


class Instead:
    """A module with some of its names exchanged."""

    def __init__(self, module, **names):
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name):
        return getattr(self._module, name)


def exchange_streams() -> None:
    cuda = torch.cuda
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = lambda *_: Stream()
    cuda.default_stream = lambda *_: Stream()
    cuda.stream = lambda _: contextlib.nullcontext()


def exchange_dispatch() -> None:
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    distributed = Instead(dist, all_gather=all_gather, reduce_scatter=reduce_scatter)
    mappings.torch = Instead(torch, distributed=distributed)
    dispatcher.maybe_move_tensor_to_cpu = moved


def moved(tensor, as_numpy=False, record_stream=False):
    """Megatron makes numbers of the CUDA tensors that hold counts of tokens, and leaves tensors of a CPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def all_gather(parts, mine, group=None):
    for index, part in enumerate(parts):
        if index == group.rank():
            part.copy_(mine)
        dist.broadcast(part, dist.get_global_rank(group, index), group=group)


def reduce_scatter(mine, parts, group=None):
    for index, part in enumerate(parts):
        total = part.clone()
        dist.all_reduce(total, group=group)
        if index == group.rank():
            mine.copy_(total)
