"""Checkpoints at every ZeRO stage: resumed to the bit, and one form for all of them, with offload and without."""

import dataclasses
import os
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_default_build_root

from helpers.zero_runs import (
    OFFLOAD,
    check_against_oracle,
    check_exact_resume,
    check_loading,
    config_of,
    load_and_go_on,
)
from slope_megatron.config import ParallelConfig


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_exact(ranks, tmp_path, stage):
    check_exact_resume(ranks, tmp_path, config_of(stage))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_a_checkpoint_loads_at_another_stage(ranks, tmp_path, before, after):
    check_loading(ranks, tmp_path, config_of(before), [config_of(after)])


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
def test_a_checkpoint_loads_at_another_stage_over_nccl(gpu_ranks, tmp_path, world):
    gpu_ranks.skip_if_too_few(world)
    check_loading(gpu_ranks, tmp_path, config_of(1), [config_of(3)], world=world)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_resume_is_exact_and_loads_without(ranks, tmp_path, stage):
    check_exact_resume(ranks, tmp_path, config_of(stage, parallel=OFFLOAD))
    results = ranks.run(load_and_go_on, config_of(2), tmp_path, world=2)
    assert results[0][0][1]["adapters"] == 1


@pytest.mark.slow
def test_state_on_an_nvme_disk_resumes_exactly_and_loads_without(ranks, tmp_path):
    """The sparse group is large enough to be swapped, the others stay in host memory; adapters join in between."""
    from slope_megatron.training.zero import offload

    config = config_of(3, parallel={"offload_optimizer": "nvme", "offload_path": str(tmp_path / "disk")})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=256, ffn_hidden_size=1024))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not list(root.rglob("async_io.so")):
        pytest.skip("DeepSpeed's async_io, which takes minutes to compile, is not built: AsyncIOBuilder().load() does")
    reason = offload.unsupported(config)
    if reason:
        pytest.skip(f"state cannot be swapped {reason}")
    in_memory = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, offload_optimizer="cpu"))
    one = dataclasses.replace(config, parallel=ParallelConfig(zero_stage=1))
    expected, found = check_loading(ranks, tmp_path / "run", config, [config, in_memory, one])
    for results in (found[config], found[in_memory]):
        assert [steps for _, steps, _ in results] == [steps for _, steps, _ in expected]
    assert list((tmp_path / "disk").rglob("*.tensor.swp"))


@pytest.mark.slow
def test_deepspeeds_cpu_adam_or_the_reason_why_not(ranks, tmp_path):
    """Where it builds (it compiles once a machine): the same losses, and checkpoints that torch's AdamW reads."""
    config = config_of(2, parallel=OFFLOAD, optimizer={})
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, adam_backend="auto"))
    check_against_oracle(ranks, config)
    check_loading(ranks, tmp_path, config, [config, config_of(3)])
