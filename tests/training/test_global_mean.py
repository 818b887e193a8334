"""The loss of a step is one mean over its global batch: independent of micro-batches, replicas and ZeRO stages."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers.models import SEQUENCE, VOCABULARY, masked, sample, save, small_config
from helpers.numerics import relative_error

SAMPLES = 16
# (micro-batch, replicas)
CUTS = list(itertools.product((1, 2, 8), (1, 2)))


def config_of(bert, *, micro=1, stage=1, **more):
    config = small_config(bert=bert, slope={"adapter_rank": 0}, **more)
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, zero_stage=stage),
        data=dataclasses.replace(config.data, micro_batch_size=micro, global_batch_size=SAMPLES),
    )


def batch_of(config, numbers, empty=False) -> dict:
    """Samples of which some count nothing, some one token, some nearly all: 0, 5, 10, 15, 4, 9, ..."""
    rows = []
    for number in numbers:
        asked = torch.zeros(SEQUENCE) if empty else (torch.arange(SEQUENCE) < number * 5 % SEQUENCE).float()
        row = sample(number)
        rows.append(row | {"loss_mask": asked, "hidden": asked.bool()})
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return masked(batch) if config.model.architecture == "bert" else batch


def own_batches(config, empty=False) -> list[dict]:
    from megatron.core import parallel_state

    from slope_megatron.data.batches import MicroBatches

    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    numbers = MicroBatches([], SAMPLES, config.data.micro_batch_size, replica, replicas)
    return [batch_of(config, numbers.sample_numbers(0, index), empty) for index in range(numbers.count)]


def oracle(config, dtype):
    """Loss and gradients of the whole global batch at once, by torch's cross-entropy."""
    from slope_megatron.models.provider import build_model

    model, batch = build_model(config, VOCABULARY, dtype), batch_of(config, range(SAMPLES))
    counted = batch["loss_mask"] > 0
    if config.model.architecture == "bert":
        logits, binary = model(batch["tokens"], batch["padding_mask"], batch["types"])
        follows = cross_entropy(binary, batch["is_next"])
    else:
        logits, follows = model(batch["tokens"], batch["position_ids"], None), 0.0
    loss = cross_entropy(logits[counted], batch["labels"][counted]) + follows
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def exact_engine(config):
    """An engine in fp64: what DeepSpeed and Megatron compute in fp32 there is beside what is asked here."""
    import deepspeed

    from slope_megatron.models.provider import build_model
    from slope_megatron.training.engine import Engine
    from slope_megatron.training.zero import partitions

    partitions.NAMES[torch.float64] = "fp32"
    deepspeed.DeepSpeedEngine._DeepSpeedEngine__check_params = lambda *_: None
    model = build_model(config, VOCABULARY, torch.float64)
    model.compute_language_model_loss = lambda labels, logits: cross_entropy(
        logits.permute(1, 2, 0), labels, reduction="none"
    )
    return Engine(model, config, torch.float64)


def exact_step(config, empty=False):
    """The step's loss, and this replica's gradients before they are reduced, summed over its micro-batches."""
    engine = exact_engine(config)
    found: dict[str, torch.Tensor] = {}

    def keep(name):
        def add(gradient):
            found[name] = found.get(name, 0.0) + gradient.clone()

        return add

    for name, parameter in engine.model.named_parameters():
        parameter.register_hook(keep(name))
    return float(engine.forward_backward_reduce(own_batches(config, empty))), found


def reduced_step(config):
    """The step's loss, and the gradients as the optimizer gets them, in fp32."""
    from deepspeed.utils import safe_get_full_grad

    from helpers.models import build_engine

    engine = build_engine(config)
    loss = float(engine.forward_backward_reduce(own_batches(config)))
    return loss, {name: safe_get_full_grad(one).clone() for name, one in engine.model.named_parameters()}


def check(found, expected, bound):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.norm() > 1e-6:  # the key biases' gradient is zero but for rounding
            assert relative_error(found[name], gradient) < bound, name


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bert", [False, True], ids=["gpt", "bert"])
def test_loss_and_gradient_do_not_depend_on_the_cut(ranks, bert, stage):
    loss, gradients = ranks.run(oracle, config_of(bert), torch.float64, world=1)[0]
    for micro, replicas in CUTS:
        results = ranks.run(exact_step, config_of(bert, micro=micro, stage=stage), world=replicas)
        for found, _ in results:
            # fp64: only the order of sums differs.
            assert found == pytest.approx(loss, rel=1e-12), (micro, replicas)
        parts = [part for _, part in results]
        check({name: sum(part[name] for part in parts) / replicas for name in parts[0]}, gradients, 1e-12)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bert", [False, True], ids=["gpt", "bert"])
def test_every_stage_divides_once(ranks, bert, stage):
    """With the replicas' mean, which is ZeRO's."""
    loss, gradients = ranks.run(oracle, config_of(bert), torch.float32, world=1)[0]
    for found, reduced in ranks.run(reduced_step, config_of(bert, micro=2, stage=stage), world=2):
        # fp32, where only the order of sums differs (DESIGN section 2).
        assert found == pytest.approx(loss, rel=1e-5)
        check(reduced, gradients, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=["TP2", "PP2"])
@pytest.mark.parametrize("bert", [False, True], ids=["gpt", "bert"])
def test_every_layout_has_the_same_loss(ranks, bert, layout):
    loss, _ = ranks.run(oracle, config_of(bert), torch.float32, world=1)[0]
    for micro in (1, 4):
        for found, *_ in ranks.run(step_loss, config_of(bert, micro=micro, **layout), world=4, **layout):
            assert found == pytest.approx(loss, rel=1e-5)


def step_loss(config):
    from helpers.models import build_engine

    return (float(build_engine(config).forward_backward_reduce(own_batches(config))),)


@pytest.mark.slow
def test_a_run_goes_on_with_another_micro_batch(ranks, tmp_path):
    """And with another number of replicas; the saved settings say that both may change."""
    whole = ranks.run(go_on_from, config_of(True, micro=8), tmp_path, 0, 4, world=1)[0]
    for micro, replicas in ((1, 1), (2, 2)):
        for rest in ranks.run(go_on_from, config_of(True, micro=micro), tmp_path, 2, 4, world=replicas):
            # fp32 in another order of summation, as of whole runs at other layouts.
            assert rest == pytest.approx(whole[2:], rel=1e-5)


def go_on_from(config, run, first, last):
    """Losses from step `first` on, which is saved or to be saved."""
    from helpers.models import build_engine
    from slope_megatron.training.checkpoint import store

    engine = build_engine(config)
    if first:
        store.check_state(store.newest(run), config)
        store.load(engine, store.newest(run))
    losses = []
    while engine.steps_done < last:
        losses.append(engine.train_step(own_batches(config)).loss)
        if not first and engine.steps_done == 2:
            save(engine, run)
    return losses


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_in_which_nothing_counts(ranks, stage):
    for loss, gradients in ranks.run(exact_step, config_of(False, micro=2, stage=stage), True, world=2):
        assert loss == 0.0
        assert gradients and not any(gradient.any() for gradient in gradients.values())


def test_validation_in_which_nothing_counts(ranks):
    assert ranks.run(empty_validation, world=1) == [0.0]


def empty_validation():
    from helpers.models import build_engine

    config = config_of(False)
    return build_engine(config).evaluate(own_batches(config, empty=True))


def test_where_every_token_counts_the_loss_keeps_its_bits():
    """The mean over a micro-batch, as it was before masks could differ."""
    from slope_megatron.training.objectives import CausalLanguageModel, counts

    losses, mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) * 11, torch.ones(3, 7)
    batch = {"loss_mask": mask}
    share = (counts(batch) * 12) / 12
    assert CausalLanguageModel.loss(batch, losses, share) == (losses * mask).sum() / mask.sum()
