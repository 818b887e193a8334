"""SmuPar (`--slope-mup`): initial values, learning rate and decay by density, against plain torch, and resumed."""

import dataclasses

import pytest
import torch

from helpers.models import VOCABULARY, build_engine, go_on, small_config, step_batches
from helpers.plain_training import parts_of_loss

STEPS = 6
# One density in each block, and so in each of two pipeline stages.
SLOPE = {"mup": True, "nm_by_block": "1=2:8", "backward_mask_interval": 0, "lr_multiplier": 1.5}
DENSITIES = {"sparse_1_2": 0.5, "sparse_1_4": 0.25}


def config_of(**more):
    config = small_config(slope=SLOPE, steps=STEPS, **more)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, sparse_weight_decay=0.3))


def groups_of(config):
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.optim.optimizer import parameter_groups
    from slope_megatron.training.schedule import Phases

    groups = parameter_groups(build_model(config, VOCABULARY, torch.float32), config)
    rate = Phases(config).learning_rate
    return {group["name"]: (len(group["params"]), rate(2, group["name"]), group["weight_decay"]) for group in groups}


def test_rate_and_decay_by_density(ranks):
    config = config_of()
    groups = ranks.run(groups_of, config, world=1)[0]
    lr, decay = config.optimizer.lr_at(2, STEPS), config.optimizer.weight_decay
    assert groups["dense"][1:] == (lr, decay)
    # Layer 0's QKV is dense.
    assert [groups[name][0] for name in DENSITIES] == [3, 4]
    for name, density in DENSITIES.items():
        assert groups[name][1:] == pytest.approx((1.5 * lr / density, 0.3 * density))
        assert groups[name][1] * groups[name][2] == pytest.approx(1.5 * lr * 0.3)
    plain = dataclasses.replace(config, slope=dataclasses.replace(config.slope, mup=False))
    assert ranks.run(groups_of, plain, world=1)[0]["sparse"] == (7, 1.5 * lr, 0.3)


def plain_training(config):
    """Losses and norms of AdamW on the packed values, each with the rate and decay that its own N:M gives."""
    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.models.provider import build_model

    model, settings = build_model(config, VOCABULARY, torch.float32), config.optimizer
    density = {id(module.weight): module.slope.n / module.slope.m for module in sparse_modules(model)}
    groups = []
    for parameter in model.parameters():
        d = density.get(id(parameter))
        decay = 0.3 * d if d else settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "rate": 1.5 / d if d else 1.0})
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    results = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for loss in parts_of_loss(config, model, step_batches(config, step, 0, 1)):
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step, STEPS) * group["rate"]
        optimizer.step()
        results.append((total, norm))
    return results


def train(config, run=None, resume=False):
    from slope_megatron.training.checkpoint import store

    engine = build_engine(config)
    if resume:
        store.load(engine, store.folder_of(run, 3))
    return go_on(engine, STEPS, () if resume or not run else (3,), run)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "replicas", "stage"), [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 2, 3)]
)
def test_every_layout_is_plain_torch(ranks, tensor, pipeline, replicas, stage):
    expected = ranks.run(plain_training, config_of(), world=1)[0]
    assert expected[-1][0] < 0.95 * expected[0][0], "it must learn, or equality says little"
    sizes = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    config = config_of(**sizes)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=stage))
    for results in ranks.run(train, config, world=tensor * pipeline * replicas, **sizes):
        assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert [norm for _, norm in results] == pytest.approx([norm for _, norm in expected], rel=1e-4)


def test_resume_is_exact(ranks, tmp_path):
    layout = {"world": 2, "tensor_parallel": 2}
    config = config_of(tensor_parallel=2)
    whole = ranks.run(train, config, tmp_path, **layout)
    for resumed, expected in zip(ranks.run(train, config, tmp_path, True, **layout), whole, strict=True):
        assert resumed == expected[3:]
