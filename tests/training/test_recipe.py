"""QK norm, z-loss, WSD, the embeddings' own rate and decay, alone and together: plain torch, every layout, resumed."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from helpers.models import VOCABULARY, build_engine, go_on, small_config, step_batches

STEPS = 6
Z_LOSS = 0.02  # large, so that it shows
RECIPE = {
    "z_loss": Z_LOSS,
    "embedding_lr_multiplier": 0.5,
    "embedding_weight_decay": 0.02,
    "lr_schedule": "wsd",
    "decay_fraction": 0.5,
}
SHAPES = {"learned": {}, "rope": {"gated": True}}


def config_of(shape="learned", slope=None, chunk=0, zero_stage=1, **more):
    slope = {"backward_mask_interval": 0, **(slope or {})}
    config = small_config(**SHAPES[shape], slope=slope, steps=STEPS, **more)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, qk_norm=True),
        optimizer=dataclasses.replace(config.optimizer, **RECIPE),
        parallel=dataclasses.replace(config.parallel, loss_chunk_tokens=chunk, zero_stage=zero_stage),
    )


def learning_rates(settings):
    """2 steps of warm-up, 1 at the peak, then 3 that begin there, with the same factor each."""
    peak, factor = settings.lr, (settings.min_lr / settings.lr) ** (1 / 3)
    return [peak / 2, peak, peak, peak, peak * factor, peak * factor**2]


def plain_training(config):
    """Cross-entropies and gradient norms of AdamW: loss and z-loss of whole logits, a group for each parameter."""
    from slope_megatron.models.provider import build_model

    model, settings = build_model(config, VOCABULARY, torch.float32), config.optimizer
    groups = []
    for name, parameter in model.named_parameters():
        embedding = name.endswith("_embeddings.weight")
        decay = 0.02 if embedding else settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "rate": 0.5 if embedding else 1.0})
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    results = []
    for step, rate in enumerate(learning_rates(settings)):
        optimizer.zero_grad()
        batches = step_batches(config, step, 0, 1)
        tokens = sum(batch["loss_mask"].sum() for batch in batches)
        total = 0.0
        for batch in batches:
            logits = model(batch["tokens"], batch["position_ids"], None)
            losses = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            squares = logits.logsumexp(-1).square().sum()
            ((losses + Z_LOSS * squares) / tokens).backward()
            total += losses.item() / tokens.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        optimizer.step()
        results.append((total, norm))
    return results


def train(config, run=None, resume=False):
    from slope_megatron.training.checkpoint import store

    engine = build_engine(config)
    if resume:
        store.load(engine, store.folder_of(run, 3))
    return go_on(engine, STEPS, () if resume or not run else (3,), run)


LAYOUTS = [
    ("learned", 1, {}),
    ("rope", 1, {"chunk": 12}),
    ("learned", 1, {"slope": {"enabled": False}}),
    ("learned", 2, {"tensor_parallel": 2}),
    ("learned", 2, {"tensor_parallel": 2, "chunk": 12}),
    ("rope", 2, {"tensor_parallel": 2, "sequence_parallel": True}),
    ("rope", 2, {"tensor_parallel": 2, "slope": {"enabled": False}}),
    ("rope", 2, {"tensor_parallel": 2, "zero_stage": 2}),
    ("learned", 2, {"pipeline_parallel": 2}),
    ("rope", 2, {"pipeline_parallel": 2}),
    ("learned", 2, {}),
    ("learned", 2, {"zero_stage": 3}),
]


@pytest.mark.parametrize(("shape", "world", "settings"), LAYOUTS, ids=str)
def test_every_layout_is_plain_torch(ranks, shape, world, settings):
    expected = ranks.run(plain_training, config_of(shape, settings.get("slope")), world=1)[0]
    assert expected[-1][0] < 0.97 * expected[0][0], "it must learn, or equality says little"
    sizes = {name: size for name, size in settings.items() if name in ("tensor_parallel", "pipeline_parallel")}
    for results in ranks.run(train, config_of(shape, **settings), world=world, **sizes):
        assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert [norm for _, norm in results] == pytest.approx([norm for _, norm in expected], rel=1e-4)


def test_resume_is_exact(ranks, tmp_path):
    layout = {"world": 2, "tensor_parallel": 2}
    config = config_of("rope", tensor_parallel=2)
    whole = ranks.run(train, config, tmp_path, **layout)
    for resumed, expected in zip(ranks.run(train, config, tmp_path, True, **layout), whole, strict=True):
        assert resumed == expected[3:]


def group_sizes(config):
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.optim.optimizer import parameter_groups

    model = build_model(config, VOCABULARY, torch.float32)
    return {group["name"]: len(group["params"]) for group in parameter_groups(model, config)}


def test_embeddings_are_a_group_only_where_asked_for(ranks):
    asked = config_of()
    assert ranks.run(group_sizes, asked, world=1)[0]["embeddings"] == 2
    plain = dataclasses.replace(asked, optimizer=small_config().optimizer)
    assert "embeddings" not in ranks.run(group_sizes, plain, world=1)[0]
    # On the last of two stages the tied copy, a placeholder where the output layer has a weight of its own.
    for shape in SHAPES:
        staged = config_of(shape, pipeline_parallel=2)
        first, last = ranks.run(group_sizes, staged, world=2, pipeline_parallel=2)
        assert (first["embeddings"], last["embeddings"]) == ({"learned": 2, "rope": 1}[shape], 1)
        assert list(first) == list(last)
