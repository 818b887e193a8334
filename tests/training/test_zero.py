"""ZeRO 1, 2, 3 and offload: equal to one process without ZeRO, and bytes equal to the formula."""

import pytest
import torch

from helpers.models import build_engine
from helpers.plain_training import SLOPE_ON_GPUS
from helpers.zero_runs import OFFLOAD, RESIDENT, STEPS, check_against_oracle, config_of, train


@pytest.mark.parametrize(
    ("stage", "parallel"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (3, RESIDENT),
        pytest.param(1, OFFLOAD, marks=pytest.mark.slow),
        pytest.param(2, OFFLOAD, marks=pytest.mark.slow),
        (3, OFFLOAD),
    ],
    ids=["1", "2", "3", "3-resident", "1-offload", "2-offload", "3-offload"],
)
def test_every_stage_equals_one_process(ranks, stage, parallel):
    results = check_against_oracle(ranks, config_of(stage, parallel=parallel))
    _, (_, counters), (held, _), _, resident = results[0]
    assert counters["sparse"] == STEPS and counters["adapters"] == STEPS - 6
    assert all(resident) if stage < 3 or parallel == RESIDENT else not any(resident)
    parameters = results[0][3][1]
    assert held["optimizer"] == pytest.approx(12 * parameters / 2, rel=0.01)
    assert held["weights"] == pytest.approx(4 * parameters / (2 if stage == 3 else 1), rel=0.15)


def test_what_describes_the_model_does_not_depend_on_the_stage(ranks):
    """Byte counts of one model, its parameters and the extra zeros: read from cut weights as from whole ones."""
    one, three = (ranks.run(train, config_of(stage), torch.float32, world=2)[0][3] for stage in (1, 3))
    for kind in ("weights", "patterns", "gradients"):
        assert one[0]["model"][kind] == three[0]["model"][kind] > 0
    assert one[0]["model"]["operands"] > 0 == three[0]["model"]["operands"]
    assert one[1] == three[1]
    assert one[2] == pytest.approx(three[2], rel=1e-3) and one[2]["measured"] > 0
    assert one[3] == pytest.approx(three[3], rel=1e-5)


@pytest.mark.parametrize(("stage", "replicas"), [(1, 2), (2, 2), (3, 2), (3, 1)])
def test_bytes_in_bf16_are_the_formulas(ranks, stage, replicas):
    for _, _, (measured, formula), *_ in ranks.run(train, config_of(stage), torch.bfloat16, world=replicas):
        assert measured == formula


def masters_of(configs, dtype):
    from slope_megatron.training.zero import partitions

    engines = [build_engine(config, dtype) for config in configs]
    parameters = {parameter.dtype for engine in engines for parameter in engine.model.parameters()}
    return parameters, {part.masters.dtype for engine in engines for part in partitions.of(engine.optimizer)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_optimizer_updates_is_fp32(ranks, dtype):
    """In 16 bits most updates of a small learning rate round away."""
    configs = [config_of(stage, parallel=parallel) for stage in (1, 2, 3) for parallel in ({}, OFFLOAD)]
    assert ranks.run(masters_of, configs, dtype, world=1) == [({dtype}, {torch.float32})]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_with_tensor_and_sequence_parallelism(ranks, stage, recompute):
    layout = {"tensor_parallel": 2, "sequence_parallel": True, "recompute": recompute}
    check_against_oracle(ranks, config_of(stage, **layout))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("stage", [2, 3])
def test_other_families(ranks, stage, family):
    check_against_oracle(ranks, config_of(stage, family=family, tensor_parallel=2), family=family)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("tensor_parallel", "replicas"), [(1, 2), (2, 2)], ids=["DP2", "TP2-DP2"])
def test_every_stage_over_nccl_equals_one_gpu(gpu_ranks, stage, tensor_parallel, replicas):
    gpu_ranks.skip_if_too_few(tensor_parallel * replicas)
    layout = {"tensor_parallel": tensor_parallel, "sequence_parallel": tensor_parallel > 1, "slope": SLOPE_ON_GPUS}
    check_against_oracle(gpu_ranks, config_of(stage, **layout), replicas=replicas)
