"""Steps that are not finite update nothing on any rank; jumps are logged; whoever hangs is named."""

import dataclasses
import math

import pytest
import torch

from helpers.models import build_engine, small_config, step_batches
from slope_megatron.config import WatchConfig


def build(config, dtype):
    from slope_megatron.training.watch.bad_steps import StepWatch

    engine = build_engine(config, dtype)
    return engine, StepWatch(config.watch, config.data.global_batch_size)


def state_of(engine):
    """Masters and moments of this rank, and its weights (with ZeRO-3: the parts that it keeps)."""
    from slope_megatron.training.zero import partitions

    tensors = [getattr(parameter, "ds_tensor", parameter).detach().clone() for parameter in engine.model.parameters()]
    for partition in partitions.of(engine.optimizer):
        state = engine.optimizer.optimizer.state[partition.masters].values()
        tensors += [partition.masters.detach().clone(), *(value.clone() for value in state if torch.is_tensor(value))]
    return tensors


def spoil_gradients(engine):
    """One number of one gradient of this rank is infinite."""

    def spoil(output):
        def infinite(gradient):
            gradient = gradient.clone()
            gradient.view(-1)[5] = math.inf
            return gradient

        output.register_hook(infinite)

    linear = engine.model.decoder.layers[1].mlp.linear_fc2
    return linear.register_forward_hook(lambda module, inputs, output: spoil(output[0])).remove


def spoil_loss(engine):
    """The loss that is reported is not a number; the gradients stay as they are."""
    original = engine.forward_backward_reduce
    engine.forward_backward_reduce = lambda batches: original(batches) * math.nan
    return lambda: setattr(engine, "forward_backward_reduce", original)


def train_with_bad_steps(config, dtype, spoil, culprits, bad_steps):
    """Losses, whether each step changed anything, what was said of it, and how it ended; of this rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from slope_megatron.training.watch.bad_steps import Diverged

    engine, watch = build(config, dtype)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    seen = []
    for step in range(6):
        restore = spoil(engine) if step in bad_steps and dist.get_rank() in culprits else lambda: None
        before = state_of(engine)
        result = engine.train_step(step_batches(config, step, replica, replicas))
        restore()
        same = [torch.equal(old, new) for old, new in zip(before, state_of(engine), strict=False)]
        assert engine.steps_done == step + 1
        try:
            news = watch.look(result, step + 1)
        except Diverged as error:
            return seen, str(error), watch.bad_steps
        seen.append((result.skipped, all(same), news))
    return seen, None, watch.bad_steps


@pytest.mark.parametrize(
    ("dtype", "spoil", "layout", "stage"),
    [
        (torch.float32, spoil_gradients, {"tensor_parallel": 2}, 1),
        (torch.bfloat16, spoil_gradients, {}, 1),
        (torch.float32, spoil_loss, {}, 1),
        pytest.param(torch.float32, spoil_loss, {}, 2, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, spoil_gradients, {}, 2, marks=pytest.mark.slow),
        pytest.param(torch.float32, spoil_gradients, {}, 3, marks=pytest.mark.slow),
    ],
    ids=[
        "gradients-fp32-TP2",
        "gradients-bf16",
        "loss-fp32",
        "loss-ZeRO-2",
        "gradients-bf16-ZeRO-2",
        "gradients-ZeRO-3",
    ],
)
def test_a_bad_step_on_one_rank_updates_nothing_anywhere(ranks, dtype, spoil, layout, stage):
    config = small_config(**layout)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=stage))
    results = ranks.run(train_with_bad_steps, config, dtype, spoil, {1}, {2, 3}, world=2, **layout)
    for rank, (seen, problem, _) in enumerate(results):
        assert problem is None
        assert [skipped for skipped, _, _ in seen] == [False, False, True, True, False, False]
        assert [same for _, same, _ in seen] == [False, False, True, True, False, False]
        if spoil is spoil_gradients or rank == 1:
            # Samples are counted over the run: 8 a step.
            assert seen[3][2] == {"bad": True, "samples": [24, 31]}


def test_too_many_bad_steps_in_a_row_end_the_run(ranks):
    config = dataclasses.replace(small_config(), watch=WatchConfig(max_bad_steps=2))
    arguments = (config, torch.float32, spoil_gradients, {0})
    [(seen, problem, bad)] = ranks.run(train_with_bad_steps, *arguments, {0, 2, 3}, world=1)
    assert len(seen) == 3 and bad == 3
    assert problem == (
        "2 steps in a row had a loss or gradients that are not finite (--max-bad-steps), the last with samples 24 to "
        "31: the run stops"
    )


def bare_watch(**settings):
    from slope_megatron.training.watch.bad_steps import StepWatch

    watch = StepWatch.__new__(StepWatch)
    import collections

    watch.settings, watch.losses = WatchConfig(**settings), collections.deque(maxlen=64)
    return watch


def test_a_jump_is_told_from_noise():
    chance = torch.Generator().manual_seed(3)
    noise = (3.0 + 0.05 * torch.randn(400, generator=chance)).tolist()
    watch = bare_watch(spike_factor=6.0)
    assert [watch.usual_loss(loss) for loss in noise] == [None] * 400
    assert watch.usual_loss(4.0) == pytest.approx(3.0, abs=0.02)
    assert watch.usual_loss(3.0) is None
    assert [bare_watch(spike_factor=0.0).usual_loss(loss) for loss in (*noise, 100.0)] == [None] * 401


def beat(rank, **values):
    from slope_megatron.training.watch.heartbeat import Heartbeat

    usual = {"pid": 100 + rank, "host": "here", "step": 7, "part": "gradients", "still": 9.0}
    return Heartbeat(rank, **{**usual, "where": "training/engine.py:1", "waits": True, **values})


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"silent": 6.0}, "stopped: no heartbeat"),
        ({"part": "batch", "waits": False}, "behind in the step"),
        ({"step": 6, "part": "update"}, "a step behind"),
        ({"waits": False}, "at the same line, and not waiting"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(odd, why):
    from slope_megatron.training.watch.hangs import describe_hang, suspects

    beats = [beat(0), beat(1, **odd), beat(2)]
    assert [found.rank for found in suspects(beats, 5.0)] == [1], why
    said = describe_hang([beats[1]], beats, 3.0)
    assert said.startswith("rank 1 (process 101 on here) in step ") and said.endswith(
        "for more than 3 seconds (--hang-timeout)"
    )


def test_where_no_rank_stands_out_all_are_shown():
    from slope_megatron.training.watch.hangs import describe_hang, suspects

    beats = [beat(0), beat(1)]
    assert suspects(beats, 5.0) == beats
    assert "none stands out: rank 0 (process 100 on here) in step 8, gradients, at" in describe_hang(beats, beats, 3.0)


def test_a_heartbeat_is_rewritten_in_place_and_survives_what_cannot_be_read(tmp_path):
    from slope_megatron.training.watch import heartbeat, process

    pulse = heartbeat.Pulse(tmp_path, process.own(3), heartbeat.OwnTime())
    pulse.announce()
    path = heartbeat.file_of(tmp_path, 3)
    node, size = path.stat().st_ino, path.stat().st_size
    pulse.reach(41, "update")
    pulse.beat()
    found = heartbeat.read(tmp_path, 3)
    assert (found.step, found.part, found.reached) == (41, "update", (41, 4))
    assert (path.stat().st_ino, path.stat().st_size) == (node, size)
    assert not process.own(3).is_gone and dataclasses.replace(process.own(3), born=1).is_gone
    path.write_text('{"rank": 3, "pi')
    assert heartbeat.read(tmp_path, 3) is None
    assert heartbeat.read(tmp_path, 4) is None
