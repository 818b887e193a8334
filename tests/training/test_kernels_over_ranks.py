"""bf16 training with the machine's sparse kernels over several ranks: losses as on one, one choice of kernels for all.

On GPUs the products run on 2:4 tensor cores over NCCL; on CPUs they are unpacked, over gloo.
"""

import dataclasses

import pytest
import torch

from helpers.models import build_engine, small_config, step_batches

STEPS = 6
# TP, PP, DP, ZeRO stage.
LAYOUTS = [(2, 1, 1, 1), (1, 2, 1, 1), (2, 1, 2, 1), (2, 1, 2, 3), (4, 1, 1, 1), (2, 2, 1, 1)]
# A bf16 number is off by at most 2^-9, 0.2 %. Tensor parallelism adds partial sums that were each rounded, so a token's
# logits differ by some of these; the mean over a step's tokens by less. Later steps compare weights that have drifted.
FIRST_STEP, LATER_STEPS = 2e-3, 1e-2


def config_of(tensor_parallel, pipeline_parallel, zero_stage, *, backend):
    """Wide enough for the kernels at TP 4."""
    slope = {"adapter_rank": 16, "lazy_fraction": 0.4, "backward_mask_interval": 3, "backend": backend}
    config = small_config(slope=slope, steps=STEPS + 4, tensor_parallel=tensor_parallel, sequence_parallel=True)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=8, init_std=0.05
        ),
        parallel=dataclasses.replace(
            config.parallel, pipeline_parallel=pipeline_parallel, zero_stage=zero_stage, recompute="full"
        ),
        optimizer=dataclasses.replace(config.optimizer, lr=2e-3, min_lr=1e-3),
    )


def train(config):
    """Losses of this rank's layout, and the kernels chosen on its stage."""
    from pathlib import Path

    from megatron.core import parallel_state

    from slope_megatron.ops import choices
    from slope_megatron.training import kernel_choices

    engine = build_engine(config, torch.bfloat16)
    kernel_choices.share(Path("none"), resumed=False)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses = [engine.train_step(step_batches(config, step, replica, replicas)).loss for step in range(STEPS)]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return losses, (stage, {str(key): str(choice) for key, choice in choices._table.items()})


ONE_RANK: dict = {}


def one_rank(pool, backend):
    if pool not in ONE_RANK:
        ONE_RANK[pool] = pool.run(train, config_of(1, 1, 1, backend=backend), world=1)[0][0]
        assert ONE_RANK[pool][-1] < 0.95 * ONE_RANK[pool][0], "it must learn, or equality says little"
    return ONE_RANK[pool]


def name(layout) -> str:
    return "TP{}-PP{}-DP{}-ZeRO{}".format(*layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=name)
def test_losses_over_gloo_are_those_of_one_rank(ranks, layout):
    check_layout(ranks, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_losses_over_nccl_are_those_of_one_gpu_and_kernels_are_common(gpu_ranks, layout):
    check_layout(gpu_ranks, layout)


def check_layout(pool, layout):
    tensor_parallel, pipeline_parallel, data_parallel, zero_stage = layout
    sizes = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    world = tensor_parallel * pipeline_parallel * data_parallel
    pool.skip_if_too_few(world)
    backend = "cusparselt" if pool.device == "cuda" else "reference"
    expected = one_rank(pool, backend)
    config = config_of(tensor_parallel, pipeline_parallel, zero_stage, backend=backend)
    results = pool.run(train, config, world=world, **sizes)
    for losses, _ in results:
        assert losses[0] == pytest.approx(expected[0], rel=FIRST_STEP)
        assert losses == pytest.approx(expected, rel=LATER_STEPS)
    chosen = dict(table for _, table in results)
    assert all(table == chosen[stage] for _, (stage, table) in results), "ranks of one stage chose different kernels"
    for table in chosen.values():
        assert bool(table) == (pool.device == "cuda")
        assert all(choice.startswith("2:4") for choice in table.values()), "dense was not allowed"
