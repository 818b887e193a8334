"""Saves: while training goes on, and of a state that must not be saved."""

import pytest
import torch

from helpers.models import build_engine, go_on, save, small_config
from helpers.resumed_runs import SLOPE, check_resumed, state_of


def saved_in_the_background(config, run, dtype):
    """Saves of steps 2 and 4 by thread while steps go on; the writer is held until two more steps are done."""
    import threading

    from slope_megatron.training.checkpoint.saver import Saver
    from slope_megatron.training.checkpoint.snapshot import Snapshot

    engine = build_engine(config, dtype)
    saver, gate, original = Saver(engine, run), threading.Event(), Snapshot.write
    Snapshot.write = lambda self, folder: (gate.wait(), original(self, folder))[1]
    results = []
    for until in (2, 4):
        results += go_on(engine, until)
        gate.clear()
        saver.save()
        results += go_on(engine, until + 1)
        assert saver.busy() and not (run / "checkpoints" / f"step_{until:08d}").exists()
        gate.set()
    saver.finish()
    assert saver.failure is None and not saver.pending
    return results + go_on(engine, 10), state_of(engine)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
def test_steps_do_not_leak_into_a_save_that_is_still_being_written(ranks, tmp_path, dtype):
    config = small_config(slope=SLOPE, steps=10, tensor_parallel=2)
    layout = {"world": 2, "tensor_parallel": 2}
    expected = ranks.run(saved_in_the_background, config, tmp_path, dtype, **layout)
    check_resumed(ranks, config, dtype, tmp_path, (2, 4), expected, **layout)


def save_a_state_that_is_not_finite(config, run):
    from slope_megatron.training.checkpoint import store

    engine = build_engine(config, torch.float32)
    go_on(engine, 1, (1,), run)
    with torch.no_grad():
        engine.optimizer.optimizer.param_groups[0]["params"][0].view(-1)[7] = torch.nan
    engine.steps_done = 2
    with pytest.raises(AssertionError, match=r"rank 0: optimizer\.fp32\..* holds numbers that are not"):
        save(engine, run)
    return [folder.name for folder in store.complete_checkpoints(run)], sorted(
        path.name for path in (run / "checkpoints").iterdir()
    )


def test_a_state_that_is_not_finite_is_never_written(ranks, tmp_path):
    [(complete, names)] = ranks.run(save_a_state_that_is_not_finite, small_config(layers=1), tmp_path, world=1)
    assert complete == ["step_00000001"] and names == ["latest", "step_00000001"]
