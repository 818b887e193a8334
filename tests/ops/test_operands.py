"""What every class of operands does: gradients by autograd; on a GPU, CUDA graphs, streams, and steps without a sync.

On a CPU the ops' plain-torch kernels stand in. wgrad of `full` mode has such tests in test_wgrad.py.
"""

import pytest
import torch

from helpers.numerics import whole_numbers
from helpers.packed import packed_weight
from slope_megatron.linear import slope_linear
from slope_megatron.ops.operands import cutlass, reference
from slope_megatron.ops.operands.float8 import EmulatedFloat8Operands, Float8Operands
from slope_megatron.ops.operands.packed import PackedOperands
from slope_megatron.ops.operands.protocol import SparseOperand

ROWS, COLUMNS, TOKENS = 512, 256, 64
DTYPE = torch.bfloat16


@pytest.fixture(params=["cusparselt", "cutlass", "float8"])
def operands(request, device, fresh_choices):
    """A weight of whole numbers, operands of one class, and those that they must equal to the bit."""
    if request.param == "cutlass" and device.type == "cuda" and cutlass.unsupported():
        pytest.skip(cutlass.unsupported())
    weight = packed_weight(ROWS, COLUMNS, DTYPE, device, whole_numbers=True)
    packed = (weight.values, weight.row_bits, weight.column_bits)
    if request.param == "float8":
        ours = Float8Operands(*packed, wgrad=True, dense_allowed=False)
        theirs = EmulatedFloat8Operands(weight.row, DTYPE, reference.PRODUCTS, wgrad=True)
        theirs.set_column_pattern(weight.column_bits, weight.values)
        return weight, ours, theirs
    ours = PackedOperands(*packed, library=request.param, dense_allowed=False)
    return weight, ours, reference.build(weight.values, weight.row_bits, weight.column_bits)


@pytest.fixture
def inputs(device):
    """X and dY."""
    return whole_numbers(TOKENS, COLUMNS, device=device), whole_numbers(TOKENS, ROWS, device=device)


def products(operands, x, dy):
    return operands.forward(x), operands.dgrad(dy), operands.wgrad(dy, x)


def test_the_autograd_function(operands, inputs):
    """Y, dX and dW of a batch of two samples."""
    weight, *both = operands
    x, dy = (tensor.unflatten(0, (2, -1)) for tensor in inputs)
    results = []
    for side in both:
        leaf, values = x.clone().requires_grad_(), weight.values.clone().requires_grad_()
        y = slope_linear(leaf, values, side)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, values.grad))
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@pytest.mark.gpu
def test_under_a_cuda_graph(operands, inputs):
    """Captured once, replayed on new inputs and new values."""
    weight, ours, theirs = operands
    with pytest.raises(RuntimeError, match="run it once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        products(ours, *inputs)
    products(ours, *inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = products(ours, *inputs)
    for tensor in inputs:
        tensor.copy_(whole_numbers(*tensor.shape, device=tensor.device))
    # In place: the forward product of the cutlass backend reads the parameter itself.
    weight.values.mul_(-1)
    for side in (ours, theirs):
        side.refresh(weight.values)
    graph.replay()
    expected = products(theirs, *inputs)
    assert all(torch.equal(found, wanted) for found, wanted in zip(outputs, expected, strict=True))


@pytest.mark.gpu
def test_on_another_stream(operands, inputs):
    _, ours, theirs = operands
    expected = products(theirs, *inputs)
    products(ours, *inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [tensor + 0 for tensor in inputs]
        outputs = products(ours, *late)
    stream.synchronize()
    assert all(torch.equal(found, wanted) for found, wanted in zip(outputs, expected, strict=True))


@pytest.mark.gpu
def test_the_products_of_a_step_do_not_synchronize(operands, inputs):
    weight, ours, _ = operands
    ours.refresh(weight.values)
    products(ours, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.refresh(weight.values)
        products(ours, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("forgotten", ["product", "add", "set_values", "set_metadata", "packed_values"])
def test_an_operand_that_lacks_a_method_cannot_be_made(forgotten):
    """A base class that did nothing instead would leave stale operands in silence."""
    methods = {name: lambda self, *_: None for name in SparseOperand.__abstractmethods__ - {forgotten}}
    with pytest.raises(TypeError, match=f"abstract method {forgotten}"):
        type("Forgetful", (SparseOperand,), methods)()
