"""CUDA graphs without a GPU: a replay computes on the tensors of the capture, and fails where one of them has moved."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from slope_megatron.training import cuda_graphs


class FakeGraph:
    """What `function` did on the tensors that it was captured with; `modules` are those that it reads."""

    def __init__(self, function: Callable[[], torch.Tensor], modules: list[torch.nn.Module]):
        self.function, self.modules, self.replays = function, modules, 0
        self.addresses = cuda_graphs.addresses(modules)

    def replay(self) -> torch.Tensor:
        assert cuda_graphs.addresses(self.modules) == self.addresses, "a graph would read what is no longer there"
        self.replays += 1
        return self.function()


@contextlib.contextmanager
def fake_graphs(capture: Callable | None = None) -> Iterator[list[FakeGraph]]:
    """Within this context a CPU's engines capture and replay; the graphs in the order of their capture.

    Args:
        capture: what is done instead of `CudaGraph`.
    """
    made: list[FakeGraph] = []

    def capture_fake(graphs, function, _what):
        made.append(FakeGraph(function, graphs.modules))
        return made[-1]

    patches = [mock.patch.object(cuda_graphs, "wanted", lambda *_: True)]
    if capture:
        patches.append(mock.patch.object(cuda_graphs, "CudaGraph", capture))
    else:
        patches.append(mock.patch.object(cuda_graphs.Graphs, "capture", capture_fake))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield made
