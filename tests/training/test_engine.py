"""The training step: TP x DP under ZeRO-1 against one process that has neither."""

import copy

import pytest
import torch

from helpers.models import build_engine, small_config, step_batches
from helpers.numerics import relative_error
from helpers.plain_training import FAMILIES, SLOPE, SLOPE_ON_GPUS, reference

# TP, PP, DP, and what else differs from one process.
LAYOUTS = [
    (1, 1, 1, {}),
    (2, 1, 2, {"sequence_parallel": True}),
    (1, 1, 4, {"recompute": "selective"}),
    (1, 2, 1, {}),
    (2, 2, 1, {"sequence_parallel": True, "recompute": "full"}),
]
ON_GPUS = [
    ("llama", (1, 1, 2, {})),
    ("llama", (2, 1, 1, {"sequence_parallel": True})),
    ("llama", (1, 2, 1, {})),
    ("llama", (4, 1, 1, {"sequence_parallel": True})),
    ("llama", (2, 1, 2, {})),
    ("llama", (2, 2, 1, {"sequence_parallel": True, "recompute": "full"})),
    ("opt", (1, 2, 2, {})),
    ("bert", (2, 1, 2, {"sequence_parallel": True})),
    ("opt", (2, 2, 2, {"sequence_parallel": True})),
    ("opt", (4, 1, 2, {"sequence_parallel": True})),
]
# Each family is cut in every way on up to four ranks above. Here each way is cut further: all of them in the family
# whose weights are cut in the most ways; OPT's biases over four ranks, and BERT's heads behind three more stages.
EIGHT_RANKS = [
    ("llama", (2, 2, 2, {})),
    ("llama", (1, 4, 2, {"recompute": "full"})),
    ("llama", (4, 2, 1, {"sequence_parallel": True})),
    ("opt", (4, 2, 1, {"sequence_parallel": True})),
    ("bert", (1, 4, 2, {"recompute": "full"})),
]


def train(config, steps):
    """Losses, gradient norms of `steps` steps on this rank's layout, and the final packed shards."""
    from megatron.core import parallel_state

    from slope_megatron.models.canonical import shards

    engine = build_engine(config, torch.float32)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    results = [engine.train_step(step_batches(config, step, replica, replicas)) for step in range(steps)]
    parts = [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(engine.model)]
    return [result.loss for result in results], [result.grad_norm for result in results], parts


def assemble(results) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's parts; parts that several ranks hold must agree to the bit."""
    whole, seen = {}, {}
    for _, _, parts in results:
        for name, offset, shape, data in parts:
            target = whole.setdefault(name, torch.zeros(shape, dtype=data.dtype))
            region = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
            if (name, offset) in seen:
                assert torch.equal(target[region], data), f"replicas of {name} differ"
            seen[name, offset] = True
            target[region] = data
    return whole


ONE_PROCESS: dict = {}


def settings_of(ranks, family) -> dict:
    return {**FAMILIES[family], "slope": SLOPE if ranks.device == "cpu" else SLOPE_ON_GPUS, "steps": 10, "layers": 4}


def one_process(ranks, family):
    """Losses, norms and final tensors of the reference; once a family and device."""
    key = ranks.device, family
    if key not in ONE_PROCESS:
        config = small_config(**settings_of(ranks, family))
        losses, norms, parts = ranks.run(reference, config, 8, world=1)[0]
        tensors = assemble([(None, None, parts)])
        assert losses[-1] < 0.9 * losses[0], "the reference must learn, or equality says little"
        blocks = "encoder" if family == "bert" else "decoder"
        assert tensors[f"{blocks}.layers.1.mlp.linear_fc1.adapter_r"].abs().max() > 0, "the adapters must have trained"
        ONE_PROCESS[key] = losses, norms, tensors
    return ONE_PROCESS[key]


def check_layouts(ranks, family, layouts):
    common = settings_of(ranks, family)
    expected_losses, expected_norms, expected = one_process(ranks, family)
    for tensor_parallel, pipeline_parallel, data_parallel, more in layouts:
        sizes = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
        config = small_config(**common, **sizes, **more)
        world = tensor_parallel * pipeline_parallel * data_parallel
        results = ranks.run(train, config, 8, world=world, **sizes)
        for losses, norms, _ in results:
            # fp32: only the order of sums differs (DESIGN section 2).
            assert losses == pytest.approx(expected_losses, rel=1e-5), config.parallel
            assert norms == pytest.approx(expected_norms, rel=1e-4), config.parallel
        whole = assemble(results)
        assert whole.keys() == expected.keys()
        for name, tensor in expected.items():
            if name.endswith("weight_pattern"):
                assert torch.equal(whole[name], tensor), name
            elif tensor.dtype != torch.uint8:
                # AdamW divides by the root of tiny second moments, which magnifies rounding.
                assert relative_error(whole[name], tensor) < 1e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_equals_one_process(ranks, family):
    check_layouts(ranks, family, LAYOUTS)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "layout"), ON_GPUS, ids=["{}-TP{}-PP{}-DP{}".format(family, *layout) for family, layout in ON_GPUS]
)
def test_every_layout_over_nccl_equals_one_gpu(gpu_ranks, family, layout):
    tensor_parallel, pipeline_parallel, data_parallel, _ = layout
    gpu_ranks.skip_if_too_few(tensor_parallel * pipeline_parallel * data_parallel)
    check_layouts(gpu_ranks, family, [layout])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), EIGHT_RANKS)
def test_eight_ranks_equal_one_process(ranks, family, layout):
    check_layouts(ranks, family, [layout])


def test_a_run_without_sparsity_is_the_dense_twin(ranks):
    sparse = ranks.run(train, small_config(), 1, world=1)[0]
    dense = ranks.run(train, small_config(slope={"enabled": False}), 1, world=1)[0]
    names = {name for name, *_ in sparse[2]}
    assert {name for name, *_ in dense[2]} == {n for n in names if not n.endswith(("_pattern", "_column"))}
    shapes = {name: shape for name, _, shape, _ in dense[2]}
    packed = {name: shape for name, _, shape, _ in sparse[2]}
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert packed[name] == (shapes[name][0], shapes[name][1] // 2)
    first = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert packed[first] == shapes[first], "the first linear after the input stays dense"


def test_evaluation_changes_nothing(ranks):
    once = ranks.run(train_with_evaluation, small_config(), False, world=1)[0]
    twice = ranks.run(train_with_evaluation, small_config(), True, world=1)[0]
    assert once == twice


def train_with_evaluation(config, evaluate):
    engine = build_engine(copy.deepcopy(config), torch.float32)
    losses = []
    for step in range(4):
        batches = step_batches(config, step, 0, 1)
        losses.append(engine.train_step(batches).loss)
        if evaluate:
            assert engine.evaluate(batches) == engine.evaluate(batches)
    return losses


def losses_with_dropout(config):
    import dataclasses

    from megatron.core import parallel_state

    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.2))
    engine = build_engine(config, torch.float32)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [engine.train_step(step_batches(config, step, replica, replicas)).loss for step in range(3)]


def random_numbers(config):
    """Of where all tensor-parallel ranks hold the same, and of where each holds its own part."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from slope_megatron.training.parallel import seed_step

    seed_step(config, 7)
    with get_cuda_rng_tracker().fork():
        own = torch.rand(4).tolist()
    return tuple(torch.rand(4).tolist()), tuple(own)


@pytest.mark.parametrize("pipeline_parallel", [1, 2], ids=["TP2-DP2", "TP2-PP2"])
def test_no_two_ranks_draw_the_same_dropout_for_their_own_parts(ranks, pipeline_parallel):
    found = ranks.run(random_numbers, small_config(), world=4, tensor_parallel=2, pipeline_parallel=pipeline_parallel)
    shared, own = zip(*found, strict=True)
    assert shared[0] == shared[1] != shared[2] == shared[3], "two tensor-parallel ranks hold the same"
    assert len(set(own) | set(shared)) == 4 + 2


def test_recomputation_draws_the_same_dropout(ranks):
    found = {
        recompute: ranks.run(losses_with_dropout, small_config(recompute=recompute), world=1)[0]
        for recompute in ("none", "selective", "full")
    }
    assert found["none"] == found["full"] == found["selective"]
    other_seed = ranks.run(losses_with_dropout, small_config(seed=5), world=1)[0]
    assert other_seed != found["none"]
