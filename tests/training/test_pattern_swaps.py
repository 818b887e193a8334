"""Dynamic patterns, simulated: the trainer against plain torch, resumed, and where it is refused."""

import dataclasses
import itertools

import pytest
import torch

from helpers.models import VOCABULARY, build_engine, go_on, save, small_config, step_batches
from helpers.numerics import relative_error
from helpers.plain_baselines import magnitude_mask
from helpers.plain_training import parts_of_loss
from slope_megatron.config import ParallelConfig
from slope_megatron.sparsity import swaps

STEPS = 8
SLOPE = {"method": "rigl", "swap_interval": 2, "swap_share": 0.5}


class PlainMasked(torch.nn.Module):
    """Takes the place of a Megatron linear that is not cut: X (S W)^T by autograd, whose gradient at S's places counts.

    G, the dense gradient of S W, is that of `effective`, which autograd keeps.
    """

    def __init__(self, stock):
        super().__init__()
        self.weight, self.bias, self.skip_bias_add = stock.weight, stock.bias, stock.skip_bias_add
        self.mask, self.dense_gradient = magnitude_mask(stock.weight.detach()), 0.0

    def forward(self, x):
        effective = (self.weight * self.mask).detach().requires_grad_() + 0.0 * self.weight
        effective.register_hook(self.take)
        y = torch.nn.functional.linear(x, effective)
        return (y, self.bias) if self.skip_bias_add else (y + self.bias, None)

    def take(self, gradient):
        self.dense_gradient = self.dense_gradient + gradient


def plain_training(config):
    """Losses and norms, weights and masks of a dense model in which some linears are masked."""
    from slope_megatron.models.layer_spec import block_linears, sparse_linears
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.optim.optimizer import parameter_groups

    slope, settings, steps = config.slope, config.optimizer, config.train.steps
    dense = dataclasses.replace(config, slope=dataclasses.replace(slope, enabled=False))
    model = build_model(dense, VOCABULARY, torch.float32)
    linears = []
    for layer in model.decoder.layers:
        for name, stock in block_linears(layer).items():
            if name in sparse_linears(slope, layer.layer_number - 1):
                linears.append(PlainMasked(stock))
                setattr(layer.mlp if "fc" in name else layer.self_attention, name, linears[-1])
    groups = parameter_groups(model, dense)
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    results = []
    for step in range(steps):
        batches = step_batches(config, step, 0, 1)
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = next(parts_of_loss(config, model, [batch])) / len(batches)
            loss.backward()
            total += loss.item()
        for linear in linears:
            linear.weight.grad = linear.dense_gradient * linear.mask
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad))
        for linear in linears:
            if step and step % slope.swap_interval == 0:
                swap(linear, optimizer.state[linear.weight], swaps.share_at(step, steps, slope.swap_share))
            linear.dense_gradient = 0.0
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step, steps)
        optimizer.step()
        results.append((total, norm))
    return results, [linear.weight.detach() * linear.mask for linear in linears], [one.mask for one in linears]


@torch.no_grad()
def swap(linear, state, share):
    """By sorting all pruned places of the layer, the most wanted of each group first."""
    weight, mask = linear.weight, linear.mask
    wanted = linear.dense_gradient.abs().masked_fill(mask, -1.0).unflatten(-1, (-1, 4))
    kept = weight.abs().masked_fill(~mask, float("inf")).unflatten(-1, (-1, 4))
    count = round(share * wanted[..., 0].numel())
    for group in wanted.amax(-1).flatten().argsort(descending=True)[:count].tolist():
        row, column = divmod(group, wanted.shape[1])
        grown, dropped = (4 * column + int(one) for one in (wanted[row, column].argmax(), kept[row, column].argmin()))
        mask[row, dropped], mask[row, grown] = False, True
        weight[row, grown] = state["exp_avg"][row, grown] = 0.0
        state["exp_avg_sq"][row, grown] = state["exp_avg_sq"][row, dropped]


def trained(config):
    """The same of the engine, and its masks after each step."""
    from slope_megatron.models.layer_spec import block_linears, masked_modules

    engine = build_engine(config)
    masked = {id(module) for module in masked_modules(engine.model)}
    modules = [linear for layer in engine.model.decoder.layers for linear in block_linears(layer).values()]
    modules = [module for module in modules if id(module) in masked]
    masks, results = [], []
    for step in range(config.train.steps):
        masks.append([module.mask() for module in modules])
        result = engine.train_step(step_batches(config, step, 0, 1))
        results.append((result.loss, result.grad_norm))
    masks.append([module.mask() for module in modules])
    return results, [module.dense_weight() for module in modules], masks


def test_swaps_are_their_few_lines_of_torch(ranks):
    config = small_config(slope=SLOPE, steps=STEPS, seed=2)
    expected, weights, masks = ranks.run(plain_training, config, world=1)[0]
    results, found, found_masks = ranks.run(trained, config, world=1)[0]
    assert results == [pytest.approx(pair, rel=1e-5) for pair in expected]
    assert len(found) == len(weights) == 7
    for weight, mask, ours, our_mask in zip(weights, masks, found, found_masks[-1], strict=True):
        assert torch.equal(our_mask, mask) and relative_error(ours, weight) < 1e-4


@pytest.mark.parametrize("rule", swaps.RULES)
def test_patterns_change_in_their_steps_alone(ranks, rule):
    """Steps 2 and 4 of 8 swap their share of the groups; from 6 on, three quarters, nothing does."""
    config = small_config(slope={**SLOPE, "swap_rule": rule}, steps=STEPS)
    results, _, masks = ranks.run(trained, config, world=1)[0]
    assert results[-1][0] < results[0][0]
    for step, (before, after) in enumerate(itertools.pairwise(masks)):
        share = swaps.share_at(step, STEPS, 0.5) if step in (2, 4) else 0.0
        for old, new in zip(before, after, strict=True):
            assert (new.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
            assert int((old != new).sum()) == 2 * round(share * old.numel() / 4)


def test_without_a_share_it_is_static(ranks):
    config = small_config(slope={**SLOPE, "swap_share": 0.0}, steps=4)
    _, _, masks = ranks.run(trained, config, world=1)[0]
    assert all(torch.equal(*pair) for pair in zip(masks[0], masks[-1], strict=True))


def resumed(config, run, resume_at=None):
    from slope_megatron.training.checkpoint import store

    engine = build_engine(config)
    if resume_at:
        store.load(engine, store.folder_of(run, resume_at))
        return go_on(engine, STEPS)
    return go_on(engine, STEPS, (3,), run)[3:]


def test_resume_is_exact(ranks, tmp_path):
    config = small_config(slope={**SLOPE, "swap_rule": "random"}, steps=STEPS, keep_checkpoints=9)
    expected = ranks.run(resumed, config, tmp_path, world=1)[0]
    assert ranks.run(resumed, config, tmp_path, 3, world=1)[0] == expected


def one_bad_step(config):
    """Masks before and after a step whose gradient is not finite, in which swaps are due."""
    from slope_megatron.models.layer_spec import masked_modules

    engine = build_engine(config)
    go_on(engine, 2)
    before = [module.mask() for module in masked_modules(engine.model)]

    def spoil(part):
        if part == "gradients":
            next(iter(masked_modules(engine.model))).weight.grad[0, 0] = float("nan")

    engine.observers.append(spoil)
    result = engine.train_step(step_batches(config, 2, 0, 1))
    return result.skipped, before, [module.mask() for module in masked_modules(engine.model)]


def test_a_skipped_step_swaps_nothing(ranks):
    skipped, before, after = ranks.run(one_bad_step, small_config(slope=SLOPE, steps=STEPS), world=1)[0]
    assert skipped and all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_several_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match="--slope-method rigl is a simulation on one rank"):
        small_config(slope=SLOPE, tensor_parallel=2)
    with pytest.raises(ValueError, match="--slope-method rigl is a simulation on one rank"):
        dataclasses.replace(small_config(slope=SLOPE), parallel=ParallelConfig(zero_stage=2))
    assert ranks.run(refusal, small_config(slope=SLOPE), world=2)[0].startswith("--slope-method rigl on 2 ranks")


def refusal(config):
    try:
        build_engine(config)
    except ValueError as error:
        return str(error)


def test_bf16_sums_are_masked_too(ranks):
    """Under ZeRO-1's own fp32 sums: a kept place's norm is all there is, and patterns change."""
    config = small_config(slope=SLOPE, steps=STEPS)
    losses, changed, outside = ranks.run(trained_in_bf16, config, world=1)[0]
    assert losses[-1] < losses[0] and changed > 0 and outside == 0.0


def trained_in_bf16(config):
    from slope_megatron.models.layer_spec import masked_modules
    from slope_megatron.training.zero import gradients

    engine = build_engine(config, torch.bfloat16)
    first, outside = [module.mask() for module in masked_modules(engine.model)], [0.0]

    def look(part):
        if part == "gradients":
            for module in masked_modules(engine.model):
                found = gradients.gradient(module.weight)
                assert found.dtype == torch.float32
                outside.append(float((found.view_as(module.weight) * ~module.mask()).abs().max()))

    engine.observers.append(look)
    losses = [loss for loss, _ in go_on(engine, STEPS)]
    changed = sum(int((old != new.mask()).sum()) for old, new in zip(first, masked_modules(engine.model), strict=True))
    return losses, changed, max(outside)


def test_checkpoints_have_the_masks(ranks, tmp_path):
    from slope_megatron.export.trained_run import TrainedRun

    config = small_config(slope=SLOPE, steps=STEPS)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=VOCABULARY))
    expected = ranks.run(saved, config, tmp_path, world=1)[0]
    found = TrainedRun(tmp_path).dense("decoder.layers.1.mlp.linear_fc1.weight", fold=False)
    assert torch.equal(found, expected) and float((found == 0).float().mean()) == 0.5


def saved(config, run):
    engine = build_engine(config)
    go_on(engine, 6)  # what has grown in the step with number 4 has left zero
    save(engine, run)
    return engine.model.decoder.layers[1].mlp.linear_fc1.dense_weight()
