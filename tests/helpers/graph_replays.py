"""A pruned layer in CUDA graphs, whose replay runs no Python: emulated on a CPU, and real ones."""

from unittest import mock

import torch

from helpers.present_values import Subject

CAPTURED = "slope_megatron.layers.pruned_linear.is_being_captured"


def replayed(subject: Subject):
    """What a CUDA graph does: the kernels of a step, and no Python."""
    layer = subject.layer
    yield from subject.evaluate()
    with mock.patch(CAPTURED, lambda weight: True):
        yield from subject.train()
    layer.weight.grad = None
    for _ in range(2):
        yield from subject.evaluate()
        layer._kept.operands.refresh(layer.weight.detach())
        layer.weight.data.mul_(-2.0)
    yield from subject.evaluate()


def captured_in_evaluation(subject: Subject):
    """A graph of an evaluation, captured where nothing has changed, holds the refresh; 0.0 where it does."""
    layer = subject.layer
    yield from subject.evaluate()
    yield from subject.evaluate()
    operands = layer._kept.operands
    with (
        mock.patch(CAPTURED, lambda weight: True),
        mock.patch.object(operands, "refresh", wraps=operands.refresh) as refresh,
    ):
        yield from subject.evaluate()
    yield float(refresh.call_count != 1)


def graph_of(function):
    """A CUDA graph of it, after the warm-up that a capture asks for; and what it returned in the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def graphs(subject: Subject):
    """Steps and evaluations that are replayed, and eager evaluations between them."""
    layer, weight = subject.layer, subject.layer.weight
    evaluation, y = graph_of(subject.evaluate_y)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True, capturable=True)

    def step():
        subject.call(subject.x).backward(subject.dy)
        optimizer.step()
        optimizer.zero_grad()

    training, _ = graph_of(step)
    for _ in range(2):
        training.replay()
        yield from subject.evaluate()
        training.replay()
        evaluation.replay()
        yield from subject.errors((y,), weight)
        yield from subject.evaluate()
