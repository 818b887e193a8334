"""ZeRO's settings: what cannot run is refused, every Adam's step counters, and the JSON that DeepSpeed gets."""

import dataclasses
import re

import pytest
import torch

from helpers.models import build_engine
from helpers.zero_runs import OFFLOAD, config_of
from slope_megatron.config import ParallelConfig


def test_what_cannot_run_is_refused_with_the_reason(ranks):
    from slope_megatron.training.zero import offload

    with pytest.raises(ValueError, match="--zero-stage is 2 with --pipeline-parallel 2: stages 2 and 3 reduce"):
        ParallelConfig(zero_stage=2, pipeline_parallel=2)
    with pytest.raises(ValueError, match="--zero-stage is 4: it must be one of 1, 2, 3"):
        ParallelConfig(zero_stage=4)
    with pytest.raises(ValueError, match="--zero3-resident-operands is given with --zero-stage 1"):
        ParallelConfig(zero3_resident_operands=True)
    with pytest.raises(ValueError, match="nvme without --offload-path, a folder on the NVMe disk; use"):
        offload.settings(config_of(3, parallel={"offload_optimizer": "nvme"}))
    refused = {
        "--offload-optimizer is nvme with --zero-stage 2: DeepSpeed swaps": config_of(
            2, parallel={"offload_optimizer": "nvme"}
        ),
        "--offload-optimizer is nvme without --offload-path, a folder on the NVMe disk; use": config_of(
            3, parallel={"offload_optimizer": "nvme"}
        ),
        "--offload-optimizer is nvme and --offload-path /proc/none cannot be written .*; use": config_of(
            3, parallel={"offload_optimizer": "nvme", "offload_path": "/proc/none"}
        ),
    }
    for backend, reason in (("apex", "apex's fused AdamW needs its state"), ("deepspeed", "fused AdamW needs a GPU")):
        config = config_of()
        forced = dataclasses.replace(config.optimizer, adam_backend=backend)
        refused[f"--adam-backend {backend} cannot run here: .*{reason}"] = dataclasses.replace(config, optimizer=forced)
    for pattern, message in zip(refused, ranks.run(refusals, list(refused.values()), world=1)[0], strict=True):
        assert re.search(pattern, message), message


def refusals(configs) -> list[str]:
    messages = []
    for config in configs:
        with pytest.raises(ValueError) as error:
            build_engine(config)
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("kept", ["tensor", "number", "group"])
def test_step_counters_as_every_adam_keeps_them(kept):
    """torch: a tensor; DeepSpeed: a number; apex: a number of the group."""
    from types import SimpleNamespace

    from slope_megatron.training.zero import partitions

    masters = torch.zeros(4)
    group = {"name": "adapters", "params": [masters], **({"step": 7} if kept == "group" else {})}
    state = {"exp_avg": torch.ones(4), **({"tensor": {"step": torch.tensor(7.0)}, "number": {"step": 7}}.get(kept, {}))}
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[group], state={masters: state}))
    (part,) = partitions.of(optimizer)
    assert partitions.step_count(optimizer, part) == 7.0
    partitions.set_step_count(optimizer, part, 5.0)
    assert partitions.step_count(optimizer, part) == 5.0
    partitions.reset_state(optimizer, "dense")
    assert partitions.step_count(optimizer, part) == 5.0
    partitions.reset_state(optimizer, "adapters")
    assert partitions.step_count(optimizer, part) == 0.0 and state["exp_avg"].abs().sum() == 0


def test_deepspeeds_json():
    from slope_megatron.training.zero.partitions import deepspeed_config

    plain = deepspeed_config(config_of(1), torch.float32, 2)
    assert plain["zero_optimization"] == {"stage": 1, "overlap_comm": False, "contiguous_gradients": True}
    assert (plain["train_micro_batch_size_per_gpu"], plain["gradient_accumulation_steps"]) == (2, 2)
    assert plain["gradient_clipping"] == 0.5 and "bf16" not in plain and "fp16" not in plain
    three = deepspeed_config(config_of(3, parallel=OFFLOAD, optimizer={"initial_loss_scale": 1024.0}), torch.float16, 1)
    assert three["zero_optimization"]["stage"] == 3
    assert three["zero_optimization"]["stage3_param_persistence_threshold"] == 4 * 64
    assert three["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert three["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 10,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    assert three["data_types"] == {"grad_accum_dtype": "fp32"}
