"""Products with adapters beside them: every strategy against the oracle, the choice between them, and its gate."""

import dataclasses

import pytest
import torch

from helpers.numerics import relative_error, whole_numbers
from helpers.packed import packed_weight
from slope_megatron.linear import slope_linear
from slope_megatron.ops import choices
from slope_megatron.ops.choices import AdapterChoice, Choice, Key, Product, Strategy
from slope_megatron.ops.operands import low_rank, reference
from slope_megatron.ops.operands.bias import bias_gradient
from slope_megatron.ops.operands.packed import PackedOperands
from slope_megatron.sparsity import reference as oracle
from slope_megatron.sparsity.packing import pack, pack_bits, unpack
from slope_megatron.sparsity.pattern import column_pattern

DTYPE = torch.bfloat16
ROWS, COLUMNS, RANK = 128, 192, 4
KEYS = {
    Product.FORWARD: Key(Product.FORWARD, ROWS, COLUMNS, 48, DTYPE, RANK),
    Product.DGRAD: Key(Product.DGRAD, COLUMNS, ROWS, 48, DTYPE, RANK),
}


def operands_of(device, *, whole=True, dense=False):
    weight = packed_weight(ROWS, COLUMNS, DTYPE, device, whole_numbers=whole)
    ours = PackedOperands(weight.values, weight.row_bits, weight.column_bits, dense_allowed=dense)
    return weight, ours


def sparse_adapters(device):
    """Factors with few entries, so that sums stay among the whole numbers that bf16 holds: 1/R is a power of two."""
    left, right = torch.zeros(RANK, COLUMNS, device=device), torch.zeros(ROWS, RANK, device=device)
    left[torch.arange(RANK), torch.arange(RANK) * 7] = 4.0
    right[torch.arange(ROWS), torch.arange(ROWS) % RANK] = 1.0
    return left.to(DTYPE), right.to(DTYPE)


@pytest.fixture(params=list(Strategy), ids=str)
def strategy(request, fresh_choices):
    """Chosen for both products, at both numbers of tokens."""
    for key in KEYS.values():
        for tokens in (48, 21):
            fresh_choices.record(dataclasses.replace(key, tokens=tokens), AdapterChoice(request.param))
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
def test_every_strategy_equals_the_oracle(device, strategy, dense, fresh_choices):
    """Whole numbers that 16 bits hold: exact whatever is rounded when, biases and the dense choice included."""
    weight, ours = operands_of(device, dense=dense)
    for key in KEYS.values():
        if dense:
            fresh_choices.record(dataclasses.replace(key, rank=0), Choice(False))
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
    indices = torch.zeros_like(weight.row)
    indices[weight.row] = weight.column.flatten()
    return indices


@pytest.mark.parametrize("tokens", [48, 21])
def test_the_strategies_differ_by_rounding_alone(device, tokens, strategy, fresh_choices):
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


@pytest.mark.parametrize("strategy", [Strategy.AUGMENTED], indirect=True, ids=str)
def test_an_augmented_operand_replaces_the_plain_one(device, strategy, fresh_choices):
    """It follows refreshes and new column patterns, and still gives the products without adapters."""
    weight, ours = operands_of(device)
    theirs = reference.build(weight.values, weight.row_bits, weight.column_bits)
    adapters = sparse_adapters(device)
    x, dy = whole_numbers(48, COLUMNS, device=device), whole_numbers(48, ROWS, device=device)
    everything(x, dy, weight.values, ours, adapters)
    assert [operand.rank for operand in ours.sparse.values()] == [RANK, RANK]
    for operands in (ours, theirs):
        operands.refresh(weight.values * 2)
    for _ in range(2):
        assert torch.equal(ours.forward(x), theirs.forward(x))
        assert torch.equal(ours.dgrad(dy), theirs.dgrad(dy))
        found, expected = (everything(x, dy, weight.values, operands, adapters) for operands in (ours, theirs))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        column = column_pattern_of(-weight.values.flip(0), weight)
        for operands in (ours, theirs):
            operands.set_column_pattern(pack_bits(column), -weight.values)


def test_an_augmented_operand_leaves_no_dense_copy_behind(device, fresh_choices):
    """One that another number of tokens wanted before the adapters joined: nothing reads it any more."""
    _, ours = operands_of(device, dense=True)
    plain = dataclasses.replace(KEYS[Product.FORWARD], rank=0)
    fresh_choices.record(plain, Choice(True))
    fresh_choices.record(dataclasses.replace(plain, tokens=32), Choice(False))
    x = whole_numbers(32, COLUMNS, device=device)
    expected = ours.forward(x)
    assert list(ours.dense) == [Product.FORWARD]
    ours.augment(Product.FORWARD, RANK)
    assert not ours.dense and torch.equal(ours.forward(x), expected)


def column_pattern_of(values, weight):
    """A second pruning by the magnitudes of other values."""
    return pack(column_pattern(unpack(values, weight.row), weight.row, 2, 4), weight.row)


def test_an_augmented_operand_is_the_matrix_that_its_docstring_shows(device, fresh_choices):
    from slope_megatron.ops.custom_ops.products import _operand_matrix

    weight, ours = operands_of(device, whole=False)
    augmented = ours.augmented_copy(Product.FORWARD, 8)
    up = torch.randn(ROWS, 8, device=device).to(DTYPE)
    augmented.set_factor(up)
    matrix = _operand_matrix(augmented.buffer, ROWS, augmented.outer_columns, 1, DTYPE)
    assert torch.equal(matrix[:, :COLUMNS], weight.dense())
    first, second = matrix[:, COLUMNS:].t().unflatten(0, (2, 32)).unbind(0)
    assert torch.equal((first + second)[:8], up.t())
    assert not (first + second)[8:].any()


def test_operands_that_cannot_add_run_the_sparse_product_first(device):
    """The reference backend, in fp64 to the bit: no choice is asked for."""
    weight = packed_weight(ROWS, COLUMNS, torch.float64, device, whole_numbers=True)
    operands = reference.build(weight.values, weight.row_bits, weight.column_bits)
    x, up = torch.ones(3, COLUMNS, device=device).double(), torch.ones(ROWS, RANK, device=device).double()
    down = torch.zeros(RANK, COLUMNS, device=device).double()
    down[:, 0] = 2.0
    found, hidden = low_rank.product(operands, Product.FORWARD, x, down, up, 0.25)
    assert torch.equal(hidden, torch.full((3, RANK), 0.5, device=device).double())
    assert torch.equal(found, x @ weight.dense().t() + 2.0)


def test_the_choice_is_saved_and_read_back(fresh_choices, tmp_path):
    choice = AdapterChoice(Strategy.AUGMENTED, {"last": 0.5, "column-augmented": 0.25})
    fresh_choices.record(KEYS[Product.FORWARD], choice)
    fresh_choices.save(tmp_path / "choices.json")
    fresh_choices.clear()
    assert fresh_choices.load(tmp_path / "choices.json")
    assert fresh_choices.find(KEYS[Product.FORWARD]) == choice
    assert str(choice) == "with adapters column-augmented (last 0.500 ms, column-augmented 0.250 ms)"


def test_the_gate_refuses_an_adding_product_that_is_wrong(device, monkeypatch, fresh_choices, caplog):
    _, ours = operands_of(device, whole=False)
    monkeypatch.setattr(low_rank.timing, "interleaved", lambda functions, **_: {name: [1.0] for name in functions})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    measured = lambda: low_rank.measure(ours, KEYS[Product.FORWARD], torch.device(device))  # noqa: E731
    assert set(measured().times) == {"last", "first", "column-augmented"}
    # It forgets what was there.
    monkeypatch.setattr(ours, "add", lambda product, x_TS, y_TR: ours.product(product, x_TS))
    assert set(measured().times) == {"last", "column-augmented"}
    assert "strategy first is not used: wrong results, relative difference" in caplog.text


def test_a_strategy_that_cannot_run_is_not_used(device, monkeypatch, fresh_choices, caplog):
    _, ours = operands_of(device, whole=False)
    monkeypatch.setattr(low_rank.timing, "interleaved", lambda functions, **_: {name: [1.0] for name in functions})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def cannot(*_):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(ours, "add", cannot)
    assert "first" not in low_rank.measure(ours, KEYS[Product.FORWARD], torch.device(device)).times
    assert "strategy first is not used: it cannot run (RuntimeError: no kernel for this shape)" in caplog.text


@pytest.mark.gpu
def test_the_choice_is_measured_once_and_works_in_a_graph(device, fresh_choices):
    _, ours = operands_of(device)
    x = whole_numbers(48, COLUMNS, device=device)
    left, right = sparse_adapters(device)
    run = lambda: low_rank.product(ours, Product.FORWARD, x, left, right, 1 / RANK)[0]  # noqa: E731
    ours.forward(x)
    with pytest.raises(RuntimeError, match="run it once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run()
    run()
    assert min(choices.find(KEYS[Product.FORWARD]).times.values()) > 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(whole_numbers(48, COLUMNS, device=device))
    graph.replay()
    assert torch.equal(y, run())
