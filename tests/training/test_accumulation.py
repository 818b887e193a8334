"""Gradients of micro-batches added up: our addition is DeepSpeed's to the bit."""

import torch

from helpers.models import VOCABULARY, small_config, step_batches


def losses(config, ours: bool) -> list[float]:
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.engine import Engine

    engine = Engine(build_model(config, VOCABULARY, torch.bfloat16), config, torch.bfloat16)
    assert "_update_hp_grad" in vars(engine.optimizer), "DeepSpeed's method has another name: look at add_gradient"
    if not ours:
        del engine.optimizer._update_hp_grad
    results = [engine.train_step(step_batches(config, step, 0, 1)) for step in range(4)]
    return [(result.loss, result.grad_norm) for result in results]


def both(config):
    return losses(config, True), losses(config, False)


def test_gradients_add_up_as_deepspeed_adds_them(ranks):
    ours, theirs = ranks.run(both, small_config(steps=4), world=1)[0]
    assert ours == theirs
