"""Training on operands that read the parameter where it lies: ZeRO moves it into flat buffers, and stage 3 at each use.

On CPUs: the ops' plain-torch twins compute, and the backend is told that it can run.
"""

import dataclasses
from unittest import mock

import pytest
import torch

from helpers.models import build_engine, small_config, step_batches

STEPS = 6


def config_of(stage: int, backend: str, resident: bool = False, mode: str = "paper"):
    slope = {"backend": backend, "adapter_rank": 4, "backward_mask_interval": 2, "mode": mode}
    config = small_config(slope=slope, steps=8)
    parallel = dataclasses.replace(config.parallel, zero_stage=stage, zero3_resident_operands=resident)
    optimizer = dataclasses.replace(config.optimizer, adam_backend="torch")
    return dataclasses.replace(config, parallel=parallel, optimizer=optimizer)


def train(config):
    """Losses of a bf16 run, and the bytes of its operands: measured, and those that the formula wants."""
    from megatron.core import parallel_state

    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.ops import backend
    from slope_megatron.ops.operands import cutlass
    from slope_megatron.training.telemetry import accounting

    told = mock.patch.object(backend, "choose", lambda requested: requested)
    with told, mock.patch.object(cutlass, "unsupported_weight", lambda values, bits: None):
        engine = build_engine(config, torch.bfloat16)
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        batches = [step_batches(config, step, replica, replicas) for step in range(STEPS)]
        losses = [engine.train_step(batch).loss for batch in batches]
        measured = accounting.local_bytes(engine)["model"]["operands"]
    wanted = 0
    for module in sparse_modules(engine.model):
        rows, columns = module.weight_pattern.shape[0], module.weight_pattern.shape[1] * 8
        # Transposed values and both metadata.
        wanted += rows * columns
        wanted += sum(out * (width + -width % 64) // 8 for out, width in ((rows, columns), (columns, rows)))
    return losses, measured, wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "resident", "mode"), [(1, False, "paper"), (3, False, "paper"), (3, True, "paper"), (3, False, "full")]
)
def test_losses_are_the_reference_s_and_no_operand_copies_the_values(ranks, stage, resident, mode):
    expected = ranks.run(train, config_of(stage, "reference", resident, mode), world=2)[0][0]
    assert expected[-1] < 0.95 * expected[0], "the reference must learn, or equality says little"
    for losses, measured, wanted in ranks.run(train, config_of(stage, "cutlass", resident, mode), world=2):
        # bf16: products round the same sums, whose order differs.
        assert losses == pytest.approx(expected, rel=5e-3)
        if stage == 1 or resident:
            assert measured == wanted
