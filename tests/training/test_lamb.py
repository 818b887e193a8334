"""LAMB under ZeRO and tensor parallelism against a few lines of torch in one process."""

import dataclasses

import pytest
import torch

from helpers.models import VOCABULARY, build_engine, go_on, step_batches
from helpers.plain_training import parts_of_loss
from helpers.zero_runs import config_of
from slope_megatron.config import OptimizerConfig

STEPS = 6
LAMB = {"optimizer": "lamb", "adam_backend": "auto", "lr": 2e-2, "min_lr": 0.0, "beta2": 0.999, "weight_decay": 0.05}


def lamb_config(stage=1, **more):
    optimizer = {**LAMB, **more.pop("optimizer", {})}
    config = config_of(stage, **more)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **optimizer))


def one_process(config):
    """The published update, parameter by parameter; the adapters' moments begin when they join."""
    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.optim.optimizer import parameter_groups
    from slope_megatron.training.schedule import Phases

    model, phases, settings = build_model(config, VOCABULARY, torch.float32), Phases(config), config.optimizer
    groups = parameter_groups(model, config)
    moments, losses, ratios = {}, [], []
    for step in range(STEPS):
        for module in sparse_modules(model):
            module.adapters_active = phases.adapters_on(step)
        model.zero_grad()
        total = sum(parts_of_loss(config, model, step_batches(config, step, 0, 1)))
        total.backward()
        losses.append(total.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        for group in groups:
            rate = phases.learning_rate(step, group["name"])
            for w in group["params"]:
                if w.grad is None:
                    continue
                count, m, v = moments.get(w, (0, torch.zeros_like(w), torch.zeros_like(w)))
                m = settings.beta1 * m + (1 - settings.beta1) * w.grad
                v = settings.beta2 * v + (1 - settings.beta2) * w.grad**2
                moments[w] = count + 1, m, v
                with torch.no_grad():
                    root = (v / (1 - settings.beta2 ** (count + 1))).sqrt() + settings.eps
                    u = m / (1 - settings.beta1 ** (count + 1)) / root + group["weight_decay"] * w
                    trusted = (group["weight_decay"] or settings.lamb_trust_no_decay) and w.norm() > 0 and u.norm() > 0
                    ratio = w.norm() / u.norm() if trusted else 1.0
                    ratios.append(float(ratio))
                    w -= rate * ratio * u
        if phases.new_column_pattern(step + 1):
            for module in sparse_modules(model):
                module.update_column_pattern()
    return losses, ratios


def losses_under_zero(config):
    return [loss for loss, _ in go_on(build_engine(config), STEPS)]


def check(ranks, config, replicas=2):
    expected, ratios = ranks.run(one_process, config, world=1)[0]
    assert expected[-1] < 0.9 * expected[0], "the reference must learn, or equality says little"
    assert 1.0 in ratios and min(ratios) < 0.5, "some parameters must have a trust ratio, some none"
    size = config.parallel.tensor_parallel
    for losses in ranks.run(losses_under_zero, config, world=size * replicas, tensor_parallel=size):
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_lamb_equals_one_process(ranks, stage):
    # The adapters join at step 4 of 10, with R = 0: their first trust ratio is 1.
    check(ranks, lamb_config(stage, steps=7))


def test_a_trust_ratio_for_what_does_not_decay(ranks):
    check(ranks, lamb_config(2, steps=7, optimizer={"lamb_trust_no_decay": True}))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_with_tensor_parallelism(ranks, stage):
    check(ranks, lamb_config(stage, steps=7, tensor_parallel=2, sequence_parallel=True))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_lamb_offloaded(ranks, stage):
    check(ranks, lamb_config(stage, steps=7, parallel={"offload_optimizer": "cpu"}))


def test_a_piece_of_a_parameter_gets_the_whole_parameters_ratio():
    """Two halves of a parameter on two ranks, one of them sharing its flat tensor with another: exact numbers."""
    from slope_megatron.training.optim.lamb import Lamb

    def ranks_part(weights, gradients, pieces, others):
        flat = torch.nn.Parameter(torch.tensor(weights))
        flat.grad = torch.tensor(gradients)
        optimizer = Lamb([{"params": [flat], "weight_decay": 1e-30}], lr=1.0, betas=(0.0, 0.0), eps=0.0)
        optimizer.attach([(flat, pieces)], lambda squares: squares.add_(others))
        optimizer.step()
        return flat.tolist()

    # With both betas 0 the update is the gradient's sign. Parameter A = (3 0 | 4 0), B = (2).
    both = [(slice(0, 2), True), (slice(2, 3), True)]
    first = ranks_part([3.0, 0.0, 2.0], [1.0, 1.0, -1.0], both, torch.tensor([[16.0, 2.0], [0.0, 0.0]]))
    # |A| = 5, |u| = 2: ratio 2.5; |B| = 2, |u| = 1.
    assert first == [0.5, -2.5, 4.0]
    second = ranks_part(
        [4.0, 0.0], [1.0, -1.0], [(slice(0, 2), True), (slice(0, 0), True)], torch.tensor([[9.0, 2.0], [4.0, 1.0]])
    )
    assert second == [1.5, 2.5]
    # A replica of B that is not counted: the counted one's squares come from the other rank.
    replica = ranks_part(
        [2.0], [1.0], [(slice(0, 0), True), (slice(0, 1), False)], torch.tensor([[25.0, 4.0], [4.0, 1.0]])
    )
    assert replica == [0.0]


def test_a_closure_gives_gradients_and_loss():
    """As torch's own optimizers take it: the weight 3 moves by its whole norm against the gradient's sign."""
    from slope_megatron.training.optim.lamb import Lamb

    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = Lamb([{"params": [weight], "weight_decay": 1e-30}], lr=1.0, betas=(0.0, 0.0), eps=0.0)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 9.0
    assert weight.tolist() == [0.0]
    assert optimizer.step() is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.55, 0.1]),
        ("poly", [1.0, 0.1 + 0.9 * 0.5**0.5, 0.1]),
        ("cosine", [1.0, 0.55, 0.1]),
    ],
)
def test_schedules_at_the_peak_halfway_and_at_the_end(schedule, expected):
    settings = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_fraction=0.1, lr_schedule=schedule)
    assert [settings.lr_at(step, 100) for step in (10, 55, 100)] == pytest.approx(expected)
    assert settings.lr_at(4, 100) == pytest.approx(0.5)


def test_the_sparse_values_have_a_weight_decay_of_their_own(ranks):
    config = lamb_config(optimizer={"sparse_weight_decay": 0.02})
    assert ranks.run(decays, config, world=1)[0] == {"sparse": 0.02, "dense": 0.05, "no_decay": 0.0, "adapters": 0.05}
    assert ranks.run(decays, lamb_config(), world=1)[0]["sparse"] == 0.05


def decays(config):
    return {group["name"]: group["weight_decay"] for group in build_engine(config).optimizer.param_groups}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup_fraction": 1.5}, "--warmup-fraction is 1.5: it must be in"),
        ({"initial_loss_scale": 1000.0}, "--initial-loss-scale is 1000.0: it must be a power of two"),
        ({"sparse_weight_decay": -0.1}, "--sparse-weight-decay is -0.1: it must not be negative"),
        ({"lr_schedule": "step"}, "--lr-schedule is 'step': it must be one of cosine, linear, poly, constant"),
        ({"optimizer": "lamb", "adam_backend": "apex"}, "--adam-backend is apex with --optimizer lamb"),
        ({"poly_power": 0.0}, "--poly-power is 0.0: it must be positive"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**wrong)
