"""Dense controls cost what they are to cost; costs are those that runs, planner and paper count."""

import dataclasses

import pytest
from study.conftest import VOCABULARY

from slope_megatron.config import Config, DataConfig, ModelConfig, SlopeConfig, TrainConfig
from slope_megatron.study import controls

MODEL = ModelConfig(
    num_layers=6,
    hidden_size=320,
    ffn_hidden_size=960,
    num_attention_heads=5,
    activation="silu",
    gated_mlp=True,
    normalization="RMSNorm",
    position="rope",
    linear_bias=False,
    tie_embeddings=False,
)
DENSE = Config(
    model=MODEL,
    slope=SlopeConfig(enabled=False),
    data=DataConfig(seq_length=512),
    train=TrainConfig(steps=1000),
)


def with_slope(**changes) -> Config:
    return dataclasses.replace(DENSE, slope=SlopeConfig(**changes))


def test_parameters_are_those_of_the_blocks():
    block = 4 * 320**2 + 3 * 320 * 960 + 2 * 320
    assert controls.body_parameters(DENSE, VOCABULARY) == 6 * block


def test_the_average_counts_what_is_multiplied():
    block = 4 * 320**2 + 3 * 320 * 960
    norms, first = 6 * 2 * 320, 3 * 320**2  # the first QKV stays dense
    kept = (6 * block - first) / 2
    static = controls.average_parameters(with_slope(), VOCABULARY)
    assert static == kept + first + norms
    assert controls.average_parameters(DENSE, VOCABULARY) == 6 * block + norms
    # Masks on a dense master multiply as many.
    assert controls.average_parameters(with_slope(method="srste"), VOCABULARY) == static
    # Adapters of rank 8 in a quarter of the steps.
    widths = 4 * 320 + 2 * 320 + 2 * 960 + 320 + 960 + 320
    adapters = 8 * (6 * widths - (4 * 320))
    found = controls.average_parameters(with_slope(adapter_rank=8, lazy_fraction=0.25), VOCABULARY)
    assert found == pytest.approx(static + 0.25 * adapters)
    # All weights in a dense start and a dense tail.
    found = controls.average_parameters(with_slope(dense_start=0.1, dense_tail=0.2), VOCABULARY)
    assert found == pytest.approx(0.7 * static + 0.3 * (6 * block + norms))
    # FST: the MLP alone; dense in the last quarter.
    mlp = 6 * 3 * 320 * 960
    fst = controls.average_parameters(with_slope(method="fst", fst_dense_tail=0.25), VOCABULARY)
    assert fst == pytest.approx(6 * block + norms - 0.75 * mlp / 2)


@pytest.mark.parametrize("speedup", [1.02, 1.2, 1.5])
@pytest.mark.parametrize("seq_length", [128, 1024])
def test_a_control_of_flops(speedup, seq_length):
    dense = dataclasses.replace(DENSE, data=DataConfig(seq_length=seq_length))
    target = controls.step_flops(dense, VOCABULARY) / speedup
    check(dense, "flops", target)


@pytest.mark.parametrize("changes", [{}, {"adapter_rank": 16}, {"nm": "2:8"}, {"fp8": "current"}], ids=str)
@pytest.mark.parametrize("to", ["state_bytes", "parameters"])
def test_a_control_of_state_and_of_parameters(to, changes):
    check(DENSE, to, controls.COSTS[to](with_slope(**changes), VOCABULARY))


def check(dense: Config, to: str, target: float) -> None:
    """It costs the target within 1 %, is narrower, as deep, and of nearly the model's own proportion."""
    model = controls.narrowed(dense, VOCABULARY, to, target)
    reached = controls.COSTS[to](dataclasses.replace(dense, model=model), VOCABULARY)
    assert reached == pytest.approx(target, rel=controls.TOLERANCE)
    assert (model.num_layers, model.num_attention_heads) == (6, 5)
    assert model.hidden_size % (5 * controls.HEAD_UNIT) == 0 and model.ffn % controls.FFN_UNIT == 0
    assert model.hidden_size <= 320 and 0.6 < (model.ffn / model.hidden_size) / 3 < 1.7


def test_state_is_the_planners():
    """Weights of 2 bytes, gradients of 4, masters and moments of 12: 18 a dense parameter."""
    held = controls.body_parameters(DENSE, VOCABULARY) + 2 * 768 * 320 + 320  # 512 entries are padded to 768
    assert controls.training_bytes(DENSE, VOCABULARY) == 18 * held
    # And what 2:4 saves of it in the sparse linears: kept values, two bitmasks, two operands with metadata.
    sparse = 6 * (4 * 320**2 + 3 * 320 * 960) - 3 * 320**2
    saved = sparse * (18 - (9 + 1 / 8 + 1 / 16 + 2 + 2 / 8))
    assert controls.training_bytes(with_slope(), VOCABULARY) == pytest.approx(18 * held - saved)


def test_state_is_that_of_the_form_that_holds_most():
    dense, sparse = (controls.training_bytes(one, VOCABULARY) for one in (DENSE, with_slope()))
    assert sparse < dense
    for phase in ("dense_start", "dense_tail"):
        assert controls.training_bytes(with_slope(**{phase: 0.1}), VOCABULARY) == dense
    # A masked dense model holds its mask and the masked copy besides.
    masked = controls.training_bytes(with_slope(method="srste"), VOCABULARY)
    assert controls.training_bytes(with_slope(method="srste", dense_tail=0.1), VOCABULARY) == masked > dense


def test_nothing_is_widened():
    with pytest.raises(ValueError, match="wider than the dense model"):
        controls.narrowed(DENSE, VOCABULARY, "flops", 2 * controls.step_flops(DENSE, VOCABULARY))
    with pytest.raises(ValueError, match="no dense model of 6 blocks and 5 heads comes within 1% of"):
        controls.narrowed(DENSE, VOCABULARY, "flops", 1.0)


SHARES = [
    ({"method": "fst"}, 5 / 6),
    ({"method": "fst", "dense_tail": 0.0}, 1.0),
    ({"method": "fst", "dense_start": 0.25, "dense_tail": 0.0}, 0.75),
    ({"method": "srste", "dense_tail": 0.5}, 0.5),
    ({"dense_start": 0.25}, 0.75),
    ({"enabled": False}, 1.0),
]


@pytest.mark.parametrize(("changes", "share"), SHARES, ids=str)
def test_the_dense_steps_of_every_method_count(changes, share):
    config = dataclasses.replace(with_slope(**changes), train=TrainConfig(steps=1200))
    assert controls.sparse_share(config) == pytest.approx(share)
    # In 100 s of dense steps, those that are sparse take 1 / 1.25 of their time.
    seconds = 100 * (1 - share) + 100 * share / 1.25
    assert controls.speedup_of_run(config, 1.25) == pytest.approx(100 / seconds)
