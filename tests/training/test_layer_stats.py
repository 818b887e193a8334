"""Figures of each weight matrix against the whole model's own tensors, at two layouts."""

import dataclasses

import pytest
import torch

from helpers.models import VOCABULARY, small_config, step_batches
from slope_megatron.config import WatchConfig


def figures_after_two_steps(config):
    """The figures of the second step; and, on one rank, what they must be: from whole tensors."""
    from deepspeed.utils import safe_get_full_grad
    from megatron.core import parallel_state

    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.engine import Engine
    from slope_megatron.training.telemetry.layer_stats import LayerStats, canonical_names, matrices, sample_all

    model = build_model(config, VOCABULARY, torch.float32)
    start, whole = sample_all(model), {name: value.detach().clone() for name, value in matrices(model).items()}
    engine = Engine(model, config, torch.float32)
    stats = LayerStats(engine, start)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    norms = {}

    def note(part):
        if part == "update" and stats.due(engine.steps_done + 1):
            stats.note_gradients()
            norms.update({name: float(safe_get_full_grad(value).norm()) for name, value in matrices(model).items()})

    engine.observers.append(note)
    for step in range(2):
        result = engine.train_step(step_batches(config, step, replica, replicas))
    names = canonical_names(model)
    exact = {
        names[name]: {"grad_norm": norms[name], "drift": float((value.data - whole[name]).norm() / whole[name].norm())}
        for name, value in matrices(model).items()
    }
    for name, values in exact.items():
        if name.endswith("adapter_r"):  # starts at zero
            del values["drift"]
    for module in sparse_modules(model):
        name = next(names[name] for name, value in matrices(model).items() if value is module.weight)
        dense = module.double_pruning()
        exact[name]["energy_lost"] = dense.energy_dropped / dense.energy
    return stats.collect(), exact, result.grad_norm


def test_the_figures_of_one_rank_are_those_of_its_tensors(ranks):
    watch = WatchConfig(layer_stats_interval=2)
    config = dataclasses.replace(small_config(slope={"adapter_rank": 4, "lazy_fraction": 1.0}), watch=watch)
    [(found, exact, total)] = ranks.run(figures_after_two_steps, config, world=1)
    assert found.keys() == exact.keys()
    assert "decoder.layers.1.mlp.linear_fc1.weight" in found and "embedding.word_embeddings.weight" in found
    for name, values in exact.items():
        assert found[name].keys() == values.keys(), name
        assert found[name]["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-5), name
        if "drift" in values:
            # 4093 samples of up to 8192 elements.
            assert found[name]["drift"] == pytest.approx(values["drift"], rel=0.05), name
        if "energy_lost" in values:
            assert found[name]["energy_lost"] == pytest.approx(values["energy_lost"], rel=1e-12), name
    matrices = sum(values["grad_norm"] ** 2 for values in found.values()) ** 0.5
    assert 0.5 * total < matrices <= total * (1 + 1e-5), "the rest is biases and norms"


def test_the_figures_do_not_depend_on_the_layout(ranks):
    watch = WatchConfig(layer_stats_interval=2)
    whole = dataclasses.replace(small_config(), watch=watch)
    cut = dataclasses.replace(small_config(tensor_parallel=2), watch=watch)
    [(expected, *_)] = ranks.run(figures_after_two_steps, whole, world=1)
    for found, *_ in ranks.run(figures_after_two_steps, cut, world=2, tensor_parallel=2):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            for key, value in values.items():
                bound = 0.05 if key == "drift" else 1e-4
                assert found[name][key] == pytest.approx(value, rel=bound), (name, key)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loss_scale_is_not_in_the_norms(ranks, stage):
    config = dataclasses.replace(small_config(), watch=WatchConfig(layer_stats_interval=2))
    [(expected, *_)] = ranks.run(figures_after_two_steps, config, world=1)
    staged = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=stage))
    found = ranks.run(figures_of_fp16, staged, world=2)[0]
    for name, values in expected.items():
        # 11 bits of mantissa in every product.
        assert found[name]["grad_norm"] == pytest.approx(values["grad_norm"], rel=2e-2), name


def figures_of_fp16(config):
    from megatron.core import parallel_state

    from slope_megatron.models.provider import build_model
    from slope_megatron.training.engine import Engine
    from slope_megatron.training.telemetry.layer_stats import LayerStats, sample_all

    model = build_model(config, VOCABULARY, torch.float16)
    start = sample_all(model)
    engine = Engine(model, config, torch.float16)
    stats = LayerStats(engine, start)
    engine.observers.append(lambda part: stats.note_gradients() if part == "update" else None)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for step in range(2):
        engine.train_step(step_batches(config, step, replica, replicas))
    return stats.collect()
