"""The autograd function against the dense oracle: forward, dX, packed dW, the adapters' gradients."""

from types import SimpleNamespace

import pytest
import torch

from helpers.numerics import integers
from slope_megatron.linear import slope_linear
from slope_megatron.ops.backend import build_operands
from slope_megatron.sparsity import reference
from slope_megatron.sparsity.packing import pack, pack_bits, unpack
from slope_megatron.sparsity.pattern import column_pattern, magnitude_pattern

PATTERNS = [(1, 2), (2, 4), (1, 4), (2, 8)]


def problem(n, m, rank, seed, dtype=torch.float64, rows=24, columns=64, tokens=(3, 5)):
    """Small whole numbers (rank a power of two, so 1/rank is exact): every product and sum below is exact in fp64."""
    weight = integers(rows, columns, seed=seed, dtype=dtype)
    mask = magnitude_pattern(weight, n, m)
    column = column_pattern(weight, mask, n, m)
    x = integers(*tokens, columns, seed=seed + 1, dtype=dtype)
    dy = integers(*tokens, rows, seed=seed + 2, dtype=dtype)
    adapter_l = integers(columns, rank, seed=seed + 3, dtype=dtype) if rank else None
    adapter_r = integers(rank, rows, seed=seed + 4, dtype=dtype) if rank else None
    return weight, mask, column, x, dy, adapter_l, adapter_r


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_products_and_gradients_equal_the_oracle_to_the_bit(n, m, rank, seed):
    weight, mask, column, x, dy, adapter_l, adapter_r = problem(n, m, rank, seed)
    values = torch.nn.Parameter(pack(weight, mask))
    operands = build_operands("reference", values.detach(), pack_bits(mask), pack_bits(pack(column, mask)))
    x = x.requires_grad_()
    adapters = None
    if rank:
        adapters = (torch.nn.Parameter(adapter_l.t().contiguous()), torch.nn.Parameter(adapter_r.t().contiguous()))
    y = slope_linear(x, values, operands, adapters=adapters)
    y.backward(dy)

    flat_x, flat_dy = x.detach().flatten(0, 1), dy.flatten(0, 1)
    assert torch.equal(y.flatten(0, 1), reference.forward(flat_x, weight, mask, adapter_l, adapter_r))
    expected = reference.backward(flat_x, flat_dy, weight, mask, column, adapter_l, adapter_r)
    assert torch.equal(x.grad.flatten(0, 1), expected.x_TK)
    assert values.grad.shape == values.shape
    assert torch.equal(unpack(values.grad, mask), expected.weight_NK)
    if rank:
        assert torch.equal(adapters[0].grad.t(), expected.adapter_l_KR)
        assert torch.equal(adapters[1].grad.t(), expected.adapter_r_RN)


def test_dgrad_reads_the_doubly_pruned_weight():
    """Were dX computed with the forward's weight, this would pass a plain gradient check, and must not."""
    weight, mask, column, _, dy, *_ = problem(2, 4, 0, 0)
    assert (mask & ~column).any()
    values = pack(weight, mask)
    operands = build_operands("reference", values, pack_bits(mask), pack_bits(pack(column, mask)))
    dx = operands.dgrad(dy.flatten(0, 1))
    assert not torch.equal(dx, dy.flatten(0, 1) @ (weight * mask))


def test_the_adapters_change_nothing_while_r_is_zero():
    weight, mask, column, x, _, adapter_l, _ = problem(2, 4, 4, 0)
    values = pack(weight, mask)
    operands = build_operands("reference", values, pack_bits(mask), pack_bits(pack(column, mask)))
    with_adapters = slope_linear(x, values, operands, adapters=(adapter_l.t(), torch.zeros(24, 4, dtype=x.dtype)))
    assert torch.equal(with_adapters, slope_linear(x, values, operands))


def test_the_exact_parts_pass_gradcheck():
    """With nothing dropped by the second pruning, and for the adapters always, backward is the gradient of forward."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, 0::2] = True
    mask[1::2] = ~mask[1::2]
    column = column_pattern(weight, mask, 2, 4)
    assert torch.equal(column, mask)

    class Operands:
        """Reference operands of whatever values come in: gradcheck moves them."""

        def __init__(self, values):
            self.inner = build_operands("reference", values.detach(), pack_bits(mask), pack_bits(pack(column, mask)))
            self.forward, self.dgrad, self.wgrad = self.inner.forward, self.inner.dgrad, self.inner.wgrad

    def function(x, values, adapter_l, adapter_r):
        return slope_linear(x, values, Operands(values), adapters=(adapter_l, adapter_r))

    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 16), (2, 16), (8, 2))]
    x, adapter_l, adapter_r = (tensor.requires_grad_() for tensor in inputs)
    values = pack(weight, mask).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, values, adapter_l, adapter_r))


def test_frozen_weights_get_no_gradient():
    weight, mask, column, x, dy, *_ = problem(2, 4, 0, 0)
    values = pack(weight, mask)
    operands = build_operands("reference", values, pack_bits(mask), pack_bits(pack(column, mask)))
    x = x.requires_grad_()
    slope_linear(x, values, operands).backward(dy)
    assert values.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("trained", ["l", "r"])
def test_of_two_factors_one_may_be_frozen(trained):
    """Fine-tuning R over a fixed L, say: the other factor's gradient is the same as if both were trained."""
    weight, mask, column, x, dy, adapter_l, adapter_r = problem(2, 4, 4, 0)
    values = pack(weight, mask)
    operands = build_operands("reference", values, pack_bits(mask), pack_bits(pack(column, mask)))
    factors = {"l": adapter_l.t().contiguous(), "r": adapter_r.t().contiguous()}
    factors[trained].requires_grad_()
    slope_linear(x, values, operands, adapters=tuple(factors.values())).backward(dy)
    expected = reference.backward(x.flatten(0, 1), dy.flatten(0, 1), weight, mask, column, adapter_l, adapter_r)
    wanted = {"l": expected.adapter_l_KR.t(), "r": expected.adapter_r_RN.t()}
    assert torch.equal(factors[trained].grad, wanted[trained])


@pytest.mark.parametrize("on_in_backward", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_autocast_leaves_the_products_in_the_type_of_the_values(rank, on_in_backward):
    """These numbers fit bf16, so what autocast does to the input before it changes nothing."""
    weight, mask, column, x, dy, adapter_l, adapter_r = problem(2, 4, rank, 0, dtype=torch.float32)
    values = torch.nn.Parameter(pack(weight, mask))
    operands = build_operands("reference", values.detach(), pack_bits(mask), pack_bits(pack(column, mask)))
    adapters = (adapter_l.t(), adapter_r.t()) if rank else None
    x = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = slope_linear(x, values, operands, adapters=adapters)
    with torch.autocast("cpu", torch.bfloat16, enabled=on_in_backward):
        y.backward(dy)
    flat_x, flat_dy = x.detach().float().flatten(0, 1), dy.flatten(0, 1)
    expected = reference.backward(flat_x, flat_dy, weight, mask, column, adapter_l, adapter_r)
    assert y.dtype == torch.float32
    assert torch.equal(y.flatten(0, 1), reference.forward(flat_x, weight, mask, adapter_l, adapter_r))
    assert torch.equal(x.grad.flatten(0, 1), expected.x_TK.bfloat16())
    assert torch.equal(unpack(values.grad, mask), expected.weight_NK)


class Journal:
    """Operands and communication that write down what happens when."""

    def __init__(self):
        self.lines = []

    def travelling(self, name, tensor):
        self.lines.append(f"{name} starts")
        return SimpleNamespace(wait=lambda: self.lines.append(f"{name} waited for") or tensor)

    def gather_input(self, x):
        return self.travelling("input", x)

    def reduce_input_gradient(self, dx):
        return self.travelling("dX", dx)

    def forward(self, x_TK):
        return x_TK @ torch.ones(8, 4, dtype=x_TK.dtype)

    def dgrad(self, dy_TN):
        self.lines.append("dgrad")
        return dy_TN @ torch.ones(4, 8, dtype=dy_TN.dtype)

    def wgrad(self, dy_TN, x_TK, rng=None, total=None):
        self.lines.append("wgrad")
        return torch.zeros(4, 4, dtype=x_TK.dtype)


def test_collectives_travel_while_products_are_computed():
    """The input, gathered again, under dgrad; dX, reduced, under wgrad."""
    journal = Journal()
    x = torch.ones(2, 8, requires_grad=True)
    y = slope_linear(x, torch.zeros(4, 4, requires_grad=True), journal, communication=journal)
    journal.lines.clear()
    y.sum().backward()
    expected = "input starts, dgrad, dX starts, input waited for, wgrad, dX waited for"
    assert ", ".join(journal.lines) == expected


def test_gradients_go_to_a_sum_that_the_caller_keeps():
    """dW of two products in fp32, each rounded as autograd would have had it; dX as always."""
    from helpers.packed import packed_weight
    from slope_megatron.ops.operands.packed import PackedOperands

    weight = packed_weight(64, 128, torch.bfloat16, torch.device("cpu"))
    operands = PackedOperands(weight.values, weight.row_bits, weight.column_bits)
    x, dy = torch.randn(24, 128).bfloat16(), torch.randn(24, 64).bfloat16()
    total = torch.randn(weight.values.shape)
    expected, values = total.clone(), weight.values.clone().requires_grad_()
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        slope_linear(inputs[0], values, operands).backward(dy)
        slope_linear(inputs[1], values, operands, gradient_sum=total).backward(dy)
        expected += values.grad.float()
        values.grad = None
        assert torch.equal(*(one.grad for one in inputs))
    assert torch.equal(total, expected) and values.grad is None
