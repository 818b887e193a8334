"""Gradients of micro-batches: added up as DeepSpeed adds them, in Megatron's order, to the bit; and nothing waits."""

import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models import build_engine, go_on, small_config, step_batches


def losses(config, ours: bool) -> list[tuple[float, float]]:
    engine = build_engine(config, torch.bfloat16)
    assert "_update_hp_grad" in vars(engine.optimizer), "DeepSpeed's method has another name: look at add_gradient"
    if not ours:
        del engine.optimizer._update_hp_grad
    return go_on(engine, 4)


def both(config):
    return losses(config, True), losses(config, False)


def test_gradients_add_up_as_deepspeed_adds_them(ranks):
    ours, theirs = ranks.run(both, small_config(steps=4), world=1)[0]
    assert ours == theirs


def schedule_and_own_loop(config, dtype):
    """Losses and norms of four steps: by our loop, and by Megatron's schedule."""
    from slope_megatron.training.zero import accumulation, partitions

    own, scheduled = build_engine(config, dtype), build_engine(config, dtype)
    sent = partitions.grad_reduce_dtype(config, dtype)
    built = accumulation.PipelinedGradients(scheduled.forward, scheduled.deepspeed, scheduled.members, sent)
    scheduled.accumulation = built
    return go_on(own, 4), go_on(scheduled, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_micro_batches_alone_give_what_megatrons_schedule_gives(ranks, dtype):
    """To the bit, while adapters join."""
    config = small_config(steps=4, recompute="full", slope={"adapter_rank": 4, "lazy_fraction": 0.5, "mode": "full"})
    own, scheduled = ranks.run(schedule_and_own_loop, config, dtype, world=1)[0]
    assert own == scheduled and len({loss for loss, _ in own}) == 4


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value goes to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def values_read(config, dtype):
    """How often a micro-batch reads a value back, and a whole step."""
    engine = build_engine(config, dtype)
    batches = step_batches(config, 0, 0, 1)
    count = engine.mean_counts(batches)
    engine.accumulation.begin(0, last=True)
    with Reads() as micro_batch:
        loss = engine.accumulation.micro_batch(engine.forward.to_device(batches[0]), count, len(batches))
    with Reads() as step:
        engine.train_step(batches)
    assert loss.isfinite() and loss.dim() == 0
    return micro_batch.count, step.count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_micro_batch_waits_for_nothing(ranks, dtype):
    config = small_config(recompute="full", slope={"adapter_rank": 4, "lazy_fraction": 1.0})
    micro_batch, step = ranks.run(values_read, config, dtype, world=1)[0]
    assert micro_batch == 0 < step


def calls(config, dtype):
    """How often DeepSpeed waits for the device, and zeroes the fp32 sums, in four steps; one of them is skipped."""
    from deepspeed.accelerator import get_accelerator

    engine = build_engine(config, dtype)
    sums = engine.optimizer
    with (
        mock.patch.object(type(get_accelerator()), "synchronize") as synchronize,
        mock.patch.object(sums, "clear_hp_grads", wraps=sums.clear_hp_grads) as clear,
    ):
        engine.train_step(step_batches(config, 0, 0, 1))
        engine.evaluate(step_batches(config, 1, 0, 1))
        run = engine.forward_backward_reduce
        engine.forward_backward_reduce = lambda batches: run(batches) * math.inf
        assert engine.train_step(step_batches(config, 1, 0, 1)).skipped
        engine.forward_backward_reduce = run
        for step in (2, 3):
            engine.train_step(step_batches(config, step, 0, 1))
    gone = all(parameter.grad is None for parameter in engine.model.parameters())
    left = sum(float(flat.abs().sum()) for flat in sums.fp32_groups_gradients_flat)
    return synchronize.call_count, clear.call_count, gone, left


def test_deepspeed_neither_waits_nor_zeroes(ranks):
    # Its throughput timer waits from the third step on.
    waits, zeroed, gone, left = ranks.run(calls, small_config(steps=4), torch.bfloat16, world=1)[0]
    assert (waits, zeroed, gone, left) == (0, 0, True, 0.0)
