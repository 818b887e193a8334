"""ZeRO 1, 2, 3 and offload: equal to one process without ZeRO, bytes equal to the formula, one form of checkpoint."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
from test_engine import SLOPE_ON_GPUS, reference
from torch.utils.cpp_extension import get_default_build_root

from helpers.models import VOCABULARY, small_config, step_batches
from helpers.numerics import relative_error
from slope_megatron.config import Config, ParallelConfig

STEPS = 8
# The column pattern is chosen anew three times, the adapters join at step 6 of 10.
SLOPE = {"adapter_rank": 4, "lazy_fraction": 0.4, "backward_mask_interval": 3, "lr_multiplier": 2.0}
FAMILIES = {"opt": {}, "llama": {"gated": True}, "bert": {"bert": True}}
LAYERS = "decoder.layers.1.mlp.linear_fc2"


def config_of(stage=1, *, family="opt", parallel=None, optimizer=None, slope=SLOPE, **more) -> Config:
    config = small_config(**FAMILIES[family], slope=slope, **{"steps": 10, "layers": 2, **more})
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, zero_stage=stage, **(parallel or {})),
        optimizer=dataclasses.replace(config.optimizer, adam_backend="torch", **(optimizer or {})),
    )


def build_engine(config, dtype=torch.float32):
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.engine import Engine

    return Engine(build_model(config, VOCABULARY, dtype), config, dtype)


def go_on(engine, until) -> list[tuple[float, float]]:
    """Losses and gradient norms up to step `until`."""
    from megatron.core import parallel_state

    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = []
    while engine.steps_done < until:
        result = engine.train_step(step_batches(engine.config, engine.steps_done, replica, replicas))
        found.append((result.loss, result.grad_norm))
    return found


def canonical_state(engine):
    """This rank's parts of model, masters and moments by canonical name, and the step counters."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from slope_megatron.training import engine_state

    engine_state.link_optimizer_state(engine)
    parts = []
    for entries in engine_state.sharded_engine_state(engine, filled=True).values():
        for entry in entries.values():
            pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            parts += [
                (piece.key, piece.global_offset, piece.global_shape, piece.data.detach().clone())
                for piece in pieces
                if isinstance(piece, ShardedTensor)
            ]
    return parts, engine_state.optimizer_steps(engine)


def train(config, dtype):
    """What a run did and became, what its ranks hold, and whether operands were there between two steps."""
    from slope_megatron.models.fill import sparse_modules
    from slope_megatron.training import accounting

    engine = build_engine(config, dtype)
    steps = go_on(engine, 4)
    # In the middle of training, which it must not change.
    val_loss = engine.evaluate(step_batches(config, 0, 0, 1))
    steps += go_on(engine, STEPS)
    resident = [module.has_operands for module in sparse_modules(engine.model)]
    held = accounting.measured_rank_bytes(engine), accounting.formula_rank_bytes(engine)
    whole = accounting.state_bytes(engine), accounting.parameter_count(engine), accounting.double_pruning(engine)
    return steps, canonical_state(engine), held, (*whole, val_loss), resident


def assemble(states) -> dict[str, torch.Tensor]:
    """Whole tensors by canonical name; parts that several ranks hold must agree to the bit."""
    whole, seen = {}, set()
    for parts, _ in states:
        for name, offset, shape, data in parts:
            target = whole.setdefault(name, torch.zeros(shape, dtype=data.dtype))
            place = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
            assert (name, offset) not in seen or torch.equal(target[place], data), f"replicas of {name} differ"
            seen.add((name, offset))
            target[place] = data
    return whole


ORACLE: dict = {}


def oracle(ranks, family="opt"):
    """Losses, norms and final tensors of one process with plain torch; once a family and device."""
    key = ranks.device, family
    if key not in ORACLE:
        slope = SLOPE if ranks.device == "cpu" else SLOPE_ON_GPUS
        losses, norms, parts = ranks.run(reference, config_of(family=family, slope=slope), STEPS, world=1)[0]
        assert losses[-1] < 0.9 * losses[0], "the reference must learn, or equality says little"
        assert max(norms) > config_of().optimizer.clip_grad, "clipping must have been active"
        ORACLE[key] = losses, norms, assemble([(parts, None)])
    return ORACLE[key]


def check_against_oracle(ranks, config, *, replicas=2, family="opt"):
    losses, norms, tensors = oracle(ranks, family)
    size = config.parallel.tensor_parallel
    results = ranks.run(train, config, torch.float32, world=size * replicas, tensor_parallel=size)
    for steps, *_ in results:
        # fp32: only the order of sums differs (DESIGN section 2).
        assert [loss for loss, _ in steps] == pytest.approx(losses, rel=1e-5)
        assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-4)
    whole = assemble([state for _, state, *_ in results])
    for name, tensor in tensors.items():
        if name.endswith("weight_pattern"):
            assert torch.equal(whole[name], tensor), name
        elif tensor.dtype != torch.uint8:
            # AdamW divides by the root of tiny second moments, which magnifies rounding.
            assert relative_error(whole[name], tensor) < 1e-3, name
    for _, _, (measured, formula), *_ in results:
        assert measured == formula
    return results


RESIDENT = {"zero3_resident_operands": True}
OFFLOAD = {"offload_optimizer": "cpu"}


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


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save_and_go_on(config, run):
    from slope_megatron.training import checkpoint

    engine = build_engine(config)
    go_on(engine, 7)
    checkpoint.save(engine, run)
    state = canonical_state(engine)
    return state, go_on(engine, 9), canonical_state(engine)


def load_and_go_on(config, run):
    from slope_megatron.training import checkpoint, zero

    engine = build_engine(config)
    # Garbage everywhere: what is right afterwards came from the files.
    with torch.no_grad():
        for partition in zero.partitions(engine.optimizer):
            partition.masters.fill_(7.0)
        for parameter in engine.model.parameters():
            parameter.fill_(7.0)
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.fill_(7.0)
        for name, buffer in engine.model.named_buffers():
            if name.endswith(("_pattern", "_column")):
                buffer.fill_(255)
    folder = checkpoint.newest(run)
    checkpoint.read_state(folder, config)
    checkpoint.load(engine, folder)
    state = canonical_state(engine)
    return state, go_on(engine, 9), canonical_state(engine)


def check_loading(ranks, run, saved, loaded, *, world=2):
    expected = ranks.run(save_and_go_on, saved, run, world=world)
    found = {}
    for config in loaded:
        results = ranks.run(load_and_go_on, config, run, world=world)
        whole, before = assemble([state for state, *_ in results]), assemble([state for state, *_ in expected])
        assert whole.keys() == before.keys() and f"optimizer.exp_avg.{LAYERS}.adapter_r" in whole
        different = [name for name, tensor in before.items() if not torch.equal(whole[name], tensor)]
        assert not different
        assert results[0][0][1] == expected[0][0][1], "step counters"
        for (_, steps, _), (_, expected_steps, _) in zip(results, expected, strict=True):
            assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected_steps], rel=1e-5)
        found[config] = results
    return expected, found


def check_exact_resume(ranks, run, config):
    expected, found = check_loading(ranks, run, config, [config])
    for (_, steps, (parts, _)), (_, expected_steps, (expected_parts, _)) in zip(found[config], expected, strict=True):
        assert steps == expected_steps
        for (name, *_, tensor), (*_, expected_tensor) in zip(parts, expected_parts, strict=True):
            assert torch.equal(tensor, expected_tensor), name


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
    from slope_megatron.training import nvme

    config = config_of(3, parallel={"offload_optimizer": "nvme", "offload_path": str(tmp_path / "disk")})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=256, ffn_hidden_size=1024))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not list(root.rglob("async_io.so")):
        pytest.skip("DeepSpeed's async_io, which takes minutes to compile, is not built: AsyncIOBuilder().load() does")
    reason = nvme.unsupported(config)
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


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_cannot_run_is_refused_with_the_reason(ranks):
    from slope_megatron.training import nvme

    with pytest.raises(ValueError, match="--zero-stage is 2 with --pipeline-parallel 2: stages 2 and 3 reduce"):
        ParallelConfig(zero_stage=2, pipeline_parallel=2)
    with pytest.raises(ValueError, match="--zero-stage is 4: it must be one of 1, 2, 3"):
        ParallelConfig(zero_stage=4)
    with pytest.raises(ValueError, match="--zero3-resident-operands is given with --zero-stage 1"):
        ParallelConfig(zero3_resident_operands=True)
    with pytest.raises(ValueError, match="nvme without --offload-path, a folder on the NVMe disk; use"):
        nvme.settings(config_of(3, parallel={"offload_optimizer": "nvme"}))
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

    from slope_megatron.training import zero

    masters = torch.zeros(4)
    group = {"name": "adapters", "params": [masters], **({"step": 7} if kept == "group" else {})}
    state = {"exp_avg": torch.ones(4), **({"tensor": {"step": torch.tensor(7.0)}, "number": {"step": 7}}.get(kept, {}))}
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[group], state={masters: state}))
    (part,) = zero.partitions(optimizer)
    assert zero.step_count(optimizer, part) == 7.0
    zero.set_step_count(optimizer, part, 5.0)
    assert zero.step_count(optimizer, part) == 5.0
    zero.reset_state(optimizer, "dense")
    assert zero.step_count(optimizer, part) == 5.0
    zero.reset_state(optimizer, "adapters")
    assert zero.step_count(optimizer, part) == 0.0 and state["exp_avg"].abs().sum() == 0


def test_deepspeeds_json():
    from slope_megatron.training.zero import deepspeed_config

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
