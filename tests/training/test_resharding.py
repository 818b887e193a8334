"""A checkpoint of one layout, loaded at others: the same state to the bit, the same losses up to the order of sums."""

import pytest
import torch

from helpers.models import build_engine, go_on, save, small_config
from helpers.zero_runs import canonical_state

SLOPE = {"adapter_rank": 4, "lazy_fraction": 0.5, "backward_mask_interval": 4}
STEPS, SAVED, END = 10, 6, 9


FAMILIES = {"opt": {}, "llama": {"gated": True}, "bert": {"bert": True}}


def config_of(family, sizes, slope=SLOPE, **more):
    return small_config(**FAMILIES[family], slope=slope, steps=STEPS, layers=4, **sizes, **more)


def save_and_go_on(config, dtype, run):

    engine = build_engine(config, dtype)
    go_on(engine, SAVED)
    save(engine, run)
    state = canonical_state(engine)
    return state, [loss for loss, _ in go_on(engine, END)]


def load_and_go_on(config, dtype, run):
    from slope_megatron.training.checkpoint import store

    engine = build_engine(config, dtype)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(7.0)
    folder = store.newest(run)
    store.check_state(folder, config)
    store.load(engine, folder)
    state = canonical_state(engine)
    return state, [loss for loss, _ in go_on(engine, END)]


def assemble(results):
    """Whole tensors by canonical name."""
    whole = {}
    for (parts, _), _ in results:
        for key, offset, shape, data in parts:
            target = whole.setdefault(key, torch.zeros(shape, dtype=data.dtype))
            target[tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))] = data
    return whole


def check_resharding(ranks, run, family, dtype, saved_at, loaded_at):
    # On GPUs no second pruning is chosen anew after the checkpoint: near ties could fall either way (test_engine).
    slope = SLOPE if ranks.device == "cpu" else {**SLOPE, "backward_mask_interval": 5}

    def layout(tensor_parallel, pipeline_parallel, data_parallel, **more):
        sizes = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
        world = tensor_parallel * pipeline_parallel * data_parallel
        return config_of(family, sizes, slope=slope, **more), {"world": world, **sizes}

    config, sizes = layout(*saved_at)
    results = ranks.run(save_and_go_on, config, dtype, run, **sizes)
    expected, (_, steps), losses = assemble(results), results[0][0], results[0][1]
    assert steps["sparse"] == SAVED and steps["adapters"] == SAVED - STEPS // 2
    names = ("weight", "weight_pattern", "weight_column", "adapter_l", "adapter_r")
    fc2 = f"{'encoder' if family == 'bert' else 'decoder'}.layers.3.mlp.linear_fc2"
    kinds = ("optimizer.fp32.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
    assert {f"{fc2}.{name}" for name in names} | {f"{kind}{fc2}.adapter_r" for kind in kinds} <= expected.keys()
    for sizes_then in loaded_at:
        config, sizes = layout(*sizes_then)
        results = ranks.run(load_and_go_on, config, dtype, run, **sizes)
        found = assemble(results)
        assert found.keys() == expected.keys()
        different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
        assert not different, f"{sizes_then}: {different}"
        assert results[0][0][1] == steps
        # Only the order of sums differs from here on; bf16 rounds each product to 3 digits.
        bound = 1e-5 if dtype == torch.float32 else 5e-3
        assert results[0][1] == pytest.approx(losses, rel=bound), sizes_then


# The fast tier has the family whose weights are cut in the most ways: grouped queries, gate and up.
@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "bert"))])
def test_a_checkpoint_loads_at_other_layouts(ranks, tmp_path, family):
    check_resharding(ranks, tmp_path, family, torch.float32, (2, 2, 1), [(1, 1, 1), (4, 1, 1), (1, 2, 2)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_checkpoint_of_four_gpus_loads_at_other_layouts(gpu_ranks, tmp_path, dtype):
    gpu_ranks.skip_if_too_few(4)
    check_resharding(gpu_ranks, tmp_path, "llama", dtype, (2, 2, 1), [(1, 1, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_checkpoint_of_eight_ranks_loads_at_other_layouts(ranks, tmp_path, dtype):
    check_resharding(
        ranks, tmp_path, "llama", dtype, (2, 2, 2), [(1, 2, 1), (4, 1, 2), (2, 1, 1), (1, 1, 4), (1, 4, 1)]
    )
