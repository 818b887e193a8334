"""Products with adapters beside them: every way against the oracle, the choice between them, and its gate."""

import dataclasses

import pytest
import torch

from helpers.numerics import relative_error
from helpers.packed import packed_weight
from slope_megatron.linear import slope_linear
from slope_megatron.ops import choices
from slope_megatron.ops.choices import Choice, Key, Order
from slope_megatron.ops.operands import low_rank, reference
from slope_megatron.ops.operands.augmented import joined_copy
from slope_megatron.ops.operands.bias import bias_gradient
from slope_megatron.ops.operands.cusparselt import CusparseltOperands
from slope_megatron.sparsity import reference as oracle
from slope_megatron.sparsity.packing import pack, unpack
from slope_megatron.sparsity.pattern import column_pattern

DTYPE = torch.bfloat16
ROWS, COLUMNS, RANK = 128, 192, 4
KEYS = {
    "forward": Key(f"forward+{RANK}", ROWS, COLUMNS, 48, DTYPE),
    "dgrad": Key(f"dgrad+{RANK}", COLUMNS, ROWS, 48, DTYPE),
}


def whole_numbers(*shape, device, high=2):
    return torch.randint(-1, high, shape, device=device).to(DTYPE)


def operands_of(device, *, whole=True):
    weight = packed_weight(ROWS, COLUMNS, DTYPE, device, whole_numbers=whole)
    ours = CusparseltOperands(weight.values, weight.row_bits, weight.column_bits, dense_allowed=False)
    return weight, ours


def sparse_adapters(device):
    """Factors with few entries, so that sums stay among the whole numbers that bf16 holds: 1/R is a power of two."""
    left, right = torch.zeros(RANK, COLUMNS, device=device), torch.zeros(ROWS, RANK, device=device)
    left[torch.arange(RANK), torch.arange(RANK) * 7] = 4.0
    right[torch.arange(ROWS), torch.arange(ROWS) % RANK] = 1.0
    return left.to(DTYPE), right.to(DTYPE)


@pytest.fixture(params=["last", "kernels", "first", "tall", "wide"])
def way(request, fresh_choices):
    """Chosen for both products, at both numbers of tokens."""
    for key in KEYS.values():
        for tokens in (48, 21):
            fresh_choices.record_order(dataclasses.replace(key, tokens=tokens), Order(request.param))
    return request.param


def everything(x, dy, values, operands, adapters, bias=None):
    """Y and all gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, values, *adapters)]
    if bias is None:
        y = slope_linear(leaves[0], leaves[1], operands, adapters=leaves[2:])
    else:
        leaves.append(bias.clone().requires_grad_())
        y = slope_linear(leaves[0], leaves[1], operands.with_bias(leaves[-1]), adapters=leaves[2:4])
        y = bias_gradient(y, leaves[-1])
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dense", [False, True])
def test_every_way_equals_the_oracle(device, way, dense, fresh_choices):
    """Whole numbers that 16 bits hold: exact whatever is rounded when, biases and the dense choice included."""
    weight, ours = operands_of(device)
    for kind, key in KEYS.items():
        if dense:
            fresh_choices.record(Key(kind, key.rows, key.columns, 48, DTYPE), Choice(False))
    adapters = sparse_adapters(device)
    x, dy = whole_numbers(48, COLUMNS, device=device), whole_numbers(48, ROWS, device=device)
    bias = whole_numbers(ROWS, device=device)
    y, dx, dvalues, dleft, dright, dbias = everything(x, dy, weight.values, ours, adapters, bias)

    left, right = (factor.t().double() for factor in adapters)
    exact = (x.double(), weight.dense().double(), weight.row, left, right)
    expected = oracle.backward(x.double(), dy.double(), *exact[1:2], weight.row, weight_column(weight), left, right)
    assert torch.equal(y.double(), oracle.forward(*exact) + bias.double())
    assert torch.equal(dx.double(), expected.x_TK)
    assert torch.equal(dvalues.double(), pack(expected.weight_NK, weight.row))
    assert torch.equal(dleft.double(), expected.adapter_l_KR.t())
    assert torch.equal(dright.double(), expected.adapter_r_RN.t())
    assert torch.equal(dbias.double(), dy.double().sum(0))


def weight_column(weight):
    """Where W^{R,C} keeps what W has: bool `[N, K]`."""
    places = torch.zeros_like(weight.row)
    places[weight.row] = weight.column.flatten()
    return places


@pytest.mark.parametrize("tokens", [48, 21])
def test_the_ways_differ_by_rounding_alone(device, tokens, way, fresh_choices):
    """Fresh random data; against fp64 each is within a few roundings to 16 bits (2^-9) of Y."""
    weight, ours = operands_of(device, whole=False)
    x, dy = (torch.randn(tokens, width, device=device).to(DTYPE) for width in (COLUMNS, ROWS))
    adapters = [torch.randn(*shape, device=device).to(DTYPE) for shape in ((RANK, COLUMNS), (ROWS, RANK))]
    left, right = (factor.t().double() for factor in adapters)
    masks = (weight.row, weight_column(weight))
    expected = oracle.backward(x.double(), dy.double(), weight.dense().double(), *masks, left, right)
    exact = oracle.forward(x.double(), weight.dense().double(), weight.row, left, right)
    y, dx, _, dleft, dright = everything(x, dy, weight.values, ours, adapters)
    wanted = (exact, expected.x_TK, expected.adapter_l_KR.t(), expected.adapter_r_RN.t())
    for found, right_answer in zip((y, dx, dleft, dright), wanted, strict=True):
        assert relative_error(found, right_answer) < 4 * 2**-9


@pytest.mark.parametrize("way", ["tall", "wide"], indirect=True)
def test_a_joined_operand_stands_in_the_place_of_the_plain_one(device, way, fresh_choices):
    """It follows refreshes and new column patterns, and still gives the products without adapters."""
    weight, ours = operands_of(device)
    theirs = reference.build(weight.values, weight.row, weight.column)
    adapters = sparse_adapters(device)
    x, dy = whole_numbers(48, COLUMNS, device=device), whole_numbers(48, ROWS, device=device)
    everything(x, dy, weight.values, ours, adapters)
    assert ours.forward_operand is None and ours.backward_operand is None
    assert {kind: joined.form for kind, joined in ours.joined.items()} == {"forward": way, "dgrad": way}
    for operands in (ours, theirs):
        operands.refresh(weight.values * 2)
    for _ in range(2):
        assert torch.equal(ours.forward(x), theirs.forward(x))
        assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))
        found, expected = (everything(x, dy, weight.values, operands, adapters) for operands in (ours, theirs))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        column = column_pattern_of(-weight.values.flip(0), weight)
        for operands in (ours, theirs):
            operands.set_column_pattern(column, -weight.values)


def column_pattern_of(values, weight):
    """A second pruning by the magnitudes of other values."""
    return pack(column_pattern(unpack(values, weight.row), weight.row, 2, 4), weight.row)


@pytest.mark.parametrize("form", ["tall", "wide"])
def test_a_joined_operand_is_the_matrix_that_its_docstring_shows(form, device, fresh_choices):
    from slope_megatron.ops.custom_ops.products import _operand_matrix

    weight, ours = operands_of(device, whole=False)
    joined = joined_copy(ours, "forward", form, 8)
    down, up = (torch.randn(*shape, device=device).to(DTYPE) for shape in ((8, COLUMNS), (ROWS, 8)))
    joined._set_factor(down, up)
    matrix = _operand_matrix(joined.buffer, joined.outer_rows, joined.outer_columns, 1, DTYPE)
    assert torch.equal(matrix[:ROWS, :COLUMNS], weight.dense())
    factor = matrix[ROWS:] if form == "tall" else matrix[:, COLUMNS:].t()
    first, second = factor.unflatten(0, (2, 32)).unbind(0)
    assert torch.equal((first + second)[:8], down if form == "tall" else up.t())
    assert not (first + second)[8:].any()


def test_operands_that_cannot_add_run_the_sparse_product_first(device):
    """The reference backend, in fp64 to the bit: no choice is asked for."""
    weight = packed_weight(ROWS, COLUMNS, torch.float64, device, whole_numbers=True)
    operands = reference.build(weight.values, weight.row, weight.column)
    x, up = torch.ones(3, COLUMNS, device=device).double(), torch.ones(ROWS, RANK, device=device).double()
    down = torch.zeros(RANK, COLUMNS, device=device).double()
    down[:, 0] = 2.0
    found, hidden = low_rank.product(operands, "forward", x, down, up, 0.25)
    assert torch.equal(hidden, torch.full((3, RANK), 0.5, device=device).double())
    assert torch.equal(found, x @ weight.dense().t() + 2.0)


def test_the_choice_is_saved_and_read_back(fresh_choices, tmp_path):
    order = Order("wide", {"last": 0.5, "wide": 0.25})
    fresh_choices.record_order(KEYS["forward"], order)
    fresh_choices.save(tmp_path / "choices.json")
    fresh_choices.clear()
    assert fresh_choices.load(tmp_path / "choices.json")
    assert fresh_choices.find_order(KEYS["forward"]) == order
    assert str(order) == "with adapters wide (last 0.500 ms, wide 0.250 ms)"


class Wrong:
    """Operands whose adding product forgets what was there."""

    def __init__(self, operands):
        self.operands, self.forward = operands, operands.forward

    def forward_add(self, x_TK, y_TN):
        return self.forward(x_TK)


def test_the_gate_refuses_an_adding_product_that_is_wrong(device, monkeypatch, fresh_choices, caplog):
    _, ours = operands_of(device, whole=False)
    monkeypatch.setattr(low_rank.timing, "interleaved", lambda ways, **_: {name: [1.0] for name in ways})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    order = low_rank.measure(Wrong(ours), "forward", KEYS["forward"], torch.device(device))
    assert order == Order("last", {"last": 1.0})
    assert "way 'first' is not used: wrong results, relative difference" in caplog.text
    assert set(low_rank.measure(ours, "forward", KEYS["forward"], torch.device(device)).times) == {
        "last",
        "first",
        "tall",
    }


def test_a_way_that_cannot_run_is_not_used(device, monkeypatch, fresh_choices, caplog):
    _, ours = operands_of(device, whole=False)
    monkeypatch.setattr(low_rank.timing, "interleaved", lambda ways, **_: {name: [1.0] for name in ways})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def cannot(*_):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(ours, "forward_add", cannot)
    assert "first" not in low_rank.measure(ours, "forward", KEYS["forward"], torch.device(device)).times
    assert "way 'first' is not used: it cannot run (RuntimeError: no kernel for this shape)" in caplog.text


@pytest.mark.gpu
def test_the_choice_is_measured_once_and_works_in_a_graph(device, fresh_choices):
    _, ours = operands_of(device)
    x = whole_numbers(48, COLUMNS, device=device)
    left, right = sparse_adapters(device)
    run = lambda: low_rank.product(ours, "forward", x, left, right, 1 / RANK)[0]  # noqa: E731
    ours.forward(x)
    with pytest.raises(RuntimeError, match="run it once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run()
    run()
    assert min(choices.find_order(KEYS["forward"]).times.values()) > 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(whole_numbers(48, COLUMNS, device=device))
    graph.replay()
    assert torch.equal(y, run())
