"""Column- and row-parallel layers at TP 1, 2, 4 against the dense oracle: small whole numbers, equal to the bit."""

import itertools

import pytest
import torch

from helpers.numerics import integers
from slope_megatron.sparsity import reference

IN, OUT, TOKENS, RANK = 128, 96, 8, 4
NAME = "layer.weight"


def build(kind, nm, rank, sequence_parallel, fp8="off"):
    """One layer of this rank, its weights whole numbers by canonical index."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slope_megatron.config import SlopeConfig
    from slope_megatron.layers.column_parallel import SlopeColumnParallelLinear
    from slope_megatron.layers.packed_weight import Region
    from slope_megatron.layers.row_parallel import SlopeRowParallelLinear
    from slope_megatron.sparsity.packing import pack

    size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=IN,
        num_attention_heads=4,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float64,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    slope = SlopeConfig(nm=nm, adapter_rank=rank, fp8=fp8)
    common = {"slope": slope, "config": config, "init_method": None, "bias": True, "skip_bias_add": False}
    if kind == "column":
        layer = SlopeColumnParallelLinear(IN, OUT, gather_output=False, **common)
        rows, columns = OUT // size, IN
        first_row, first_column = tp_rank * rows, 0
    else:
        layer = SlopeRowParallelLinear(IN, OUT, input_is_parallel=True, **common)
        rows, columns = OUT, IN // size
        first_row, first_column = 0, tp_rank * columns
    layer.init_weight(11, Region(NAME, range(rows), first_row, first_column, IN), std=1.0)
    with torch.no_grad():
        whole = integers(OUT, IN, seed=1)[first_row : first_row + rows, first_column : first_column + columns]
        layer.weight.copy_(pack(whole, layer.row_pattern()))
        layer.bias.copy_(integers(OUT, seed=2)[first_row : first_row + rows])
        if rank:
            layer.adapter_l.copy_(integers(IN, rank, seed=3)[first_column : first_column + columns].t())
            layer.adapter_r.copy_(integers(rank, OUT, seed=4)[:, first_row : first_row + rows].t())
            layer.adapters_active = True
    layer.update_column_pattern()
    return layer, range(first_row, first_row + rows), range(first_column, first_column + columns)


def shard_of_oracle(kind, nm, rank, sequence_parallel, fp8="off"):
    """Run one layer on this rank; returns whether everything equals this rank's part of the unsharded oracle."""
    from megatron.core import parallel_state

    from slope_megatron.sparsity import counter
    from slope_megatron.sparsity.packing import unpack
    from slope_megatron.sparsity.pattern import column_pattern, random_pattern

    size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    layer, rows, columns = build(kind, nm, rank, sequence_parallel, fp8)
    n, m = layer.slope.n, layer.slope.m
    words = counter.bits(counter.key_of(11, f"{NAME}_pattern"), range(OUT), range(IN), IN)
    mask = random_pattern(words, n, m)
    weight = integers(OUT, IN, seed=1)
    column = column_pattern(weight, mask, n, m)
    x, dy = integers(TOKENS, 1, IN, seed=5), integers(TOKENS, 1, OUT, seed=6)
    adapters = (integers(IN, rank, seed=3), integers(rank, OUT, seed=4)) if rank else ()

    sequence = slice(tp_rank * TOKENS // size, (tp_rank + 1) * TOKENS // size) if sequence_parallel else slice(None)
    wide = slice(columns.start, columns.stop)
    tall = slice(rows.start, rows.stop)
    x_here = (x[sequence] if kind == "column" else x[..., wide]).clone().requires_grad_()
    y, _ = layer(x_here)
    y.backward(dy[..., tall] if kind == "column" else dy[sequence])

    y_whole = reference.forward(x[:, 0], weight, mask, *adapters) + integers(OUT, seed=2)
    expected = reference.backward(x[:, 0], dy[:, 0], weight, mask, column, *adapters)
    y_expected = y_whole[:, tall] if kind == "column" else y_whole[sequence]
    dx_expected = expected.x_TK[sequence] if kind == "column" else expected.x_TK[:, wide]
    bias_expected = dy[:, 0].sum(0)[tall] if kind == "column" else dy[sequence, 0].sum(0)
    checks = {
        "y": torch.equal(y[:, 0], y_expected),
        "dx": torch.equal(x_here.grad[:, 0], dx_expected),
        "pattern": torch.equal(layer.row_pattern(), mask[tall, wide]),
        "column": torch.equal(unpack(layer.surviving(), layer.row_pattern()), column[tall, wide]),
        "dw": torch.equal(unpack(layer.weight.grad, mask[tall, wide]), expected.weight_NK[tall, wide]),
        "dbias": torch.equal(layer.bias.grad, bias_expected),
    }
    if rank:
        checks["dl"] = torch.equal(layer.adapter_l.grad.t(), expected.adapter_l_KR[wide])
        checks["dr"] = torch.equal(layer.adapter_r.grad.t(), expected.adapter_r_RN[:, tall])
    return checks


CASES = list(itertools.product(["column", "row"], ["2:4", "1:2", "2:8"], [0, RANK], [False, True]))
# e4m3 holds these whole numbers, so rounding to it changes nothing.
CASES += [(kind, "2:4", RANK, True, "current") for kind in ("column", "row")]


def all_shards(cases):
    return {case: shard_of_oracle(*case) for case in cases}


@pytest.fixture(scope="module")
def shards(ranks):
    """`size: the checks of each rank`, of all cases at once: starting ranks takes longer than a small layer."""
    cases = {size: [case for case in CASES if size > 1 or not case[3]] for size in (1, 2, 4)}
    return {size: ranks.run(all_shards, cases[size], world=size, tensor_parallel=size) for size in cases}


def name_of(case) -> str:
    return f"{case[0]}-{'sp' if case[3] else 'tp'}-{case[2]}-{'-'.join(case[1:2] + case[4:])}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_shard_equals_its_part_of_the_oracle(shards, case):
    sizes = (2, 4) if case[3] else (1, 2, 4)
    for size in sizes:
        for tp_rank, checks in enumerate(shards[size]):
            wrong = [name for name, equal in checks[case].items() if not equal]
            assert not wrong, f"TP {size}, rank {tp_rank}: {wrong} differ from the oracle"


def life_of_a_layer():
    """Messages and guards of one layer on one rank."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slope_megatron.config import SlopeConfig
    from slope_megatron.layers.column_parallel import SlopeColumnParallelLinear
    from slope_megatron.layers.packed_weight import Region

    def message(call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            return str(error)
        return "nothing was raised"

    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, perform_initialization=False, use_cpu_initialization=True
    )
    common = {"slope": SlopeConfig(), "config": config, "init_method": None}
    layer = SlopeColumnParallelLinear(64, 32, **common)
    x = torch.randn(3, 64)
    found = {
        "unfilled": message(lambda: layer(x)),
        "cut": message(lambda: SlopeColumnParallelLinear(24, 32, **common)),
        "tied": message(lambda: SlopeColumnParallelLinear(64, 32, skip_weight_param_allocation=True, **common)),
    }
    layer.init_weight(0, Region("w", range(32), 0, 0, 64), std=1.0)
    layer.update_column_pattern()
    torch.nn.init.zeros_(layer.bias)  # Megatron leaves it as it finds the memory: init_weights writes it
    before = layer(x)[0]
    with torch.no_grad():
        layer.weight.mul_(2.0)
    found["in-place update is seen"] = torch.allclose(layer(x)[0], 2 * before)
    state = layer.state_dict()
    other = SlopeColumnParallelLinear(64, 32, **common)
    other.load_state_dict(state)
    found["load restores"] = torch.equal(other(x)[0], layer(x)[0])
    other.drop_operands()
    with torch.inference_mode():
        validated = other(x)[0]
    with torch.no_grad():
        other.weight.mul_(2.0)
    trained = other(x)[0]
    trained.sum().backward()
    found["inference mode leaves it trainable"] = torch.allclose(trained, 2 * validated)
    found["dtype follows"] = other.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
    found["saved"] = sorted(name for name in state if not name.endswith("_extra_state"))
    return found


def test_one_layer_alone(ranks):
    found = ranks.run(life_of_a_layer, world=1)[0]
    assert "has no weight, weight_pattern, weight_column yet: initialize the built model" in found["unfilled"]
    assert "2:4 shard of 32 x 24" in found["cut"] and "in one of 16" in found["cut"]
    assert "skip_weight_param_allocation is True" in found["tied"] and "keep this linear dense" in found["tied"]
    assert found["in-place update is seen"] and found["load restores"] and found["dtype follows"]
    assert found["inference mode leaves it trainable"]
    assert found["saved"] == ["bias", "weight", "weight_column", "weight_pattern"]
