"""CUDA graphs without a GPU: a replay computes on the tensors of the capture, without the Python that ran there."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from slope_megatron.training import cuda_graphs


class FakeGraph:
    """What `function` did on the tensors that it was captured with."""

    def __init__(self, function: Callable[[], torch.Tensor]):
        self.function, self.replays = function, 0

    def replay(self) -> torch.Tensor:
        self.replays += 1
        return self.function()


@contextlib.contextmanager
def fake_graphs(capture: Callable | None = None) -> Iterator[list[FakeGraph]]:
    """Within this context a CPU's engines capture and replay; the graphs in the order of their capture.

    Args:
        capture: what is done instead.
    """
    made: list[FakeGraph] = []

    def capture_fake(function, _pool):
        made.append(FakeGraph(function))
        return made[-1]

    with (
        mock.patch.object(cuda_graphs, "CudaGraph", capture or capture_fake),
        mock.patch.object(cuda_graphs, "wanted", lambda *_: True),
    ):
        yield made
