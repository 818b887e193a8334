"""How runs end that cannot go on, or cannot save: exit code, one sentence, the last good checkpoint intact."""

import dataclasses
import errno
import math
import time

import pytest
from faults import ranks

from slope_megatron.config import WatchConfig


def nan_from_step_7(rank):
    """From its seventh step on, the second rank's gradients hold a NaN."""
    from slope_megatron.training.engine import Engine

    original = Engine.train_step

    def train_step(self, batches):
        if self.steps_done >= 6 and rank == 1:
            parameter = self.model.decoder.layers[0].mlp.linear_fc1.weight
            parameter.register_hook(lambda gradient: gradient * math.nan)
        return original(self, batches)

    Engine.train_step = train_step


def test_step_after_step_that_is_not_finite_ends_the_run(fault_data, tmp_path):
    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import store

    config = ranks.settings(fault_data, tmp_path / "run", 1)
    config = dataclasses.replace(config, watch=WatchConfig(max_bad_steps=3))
    ended = ranks.start(config, tmp_path / "logs", prepare_rank=nan_from_step_7)
    assert ended.codes == [65, 65], ended.said
    assert "step 7: loss" in ended.said and "nothing was updated (bad step 1 in a row); samples 24 to 27" in ended.said
    [said] = [line for line in ended.said.splitlines() if line.startswith("slope: error: ")]
    assert (
        "3 steps in a row had a loss or gradients that are not finite (--max-bad-steps), the last with samples 32 to"
        in said
    )
    newest = store.newest(tmp_path / "run")
    assert f"Checkpoint {newest} is complete" in said
    # Saved at the eighth step: the second bad one, whose state is still that of step 6.
    assert newest.name == "step_00000008" and sums.find_damage(newest) is None
    lines = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"bad": true' in line]
    assert len(lines) == 3 and not (tmp_path / "run" / "DONE").exists()


def disk_full_from_step_8(rank):
    from torch.distributed.checkpoint import filesystem

    original = filesystem._write_item

    def write(transforms, stream, *rest, **more):
        if any(f"step_{step:08d}" in str(stream.name) for step in (8, 10, 12)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(transforms, stream, *rest, **more)

    filesystem._write_item = write


def test_a_last_checkpoint_that_cannot_be_written_is_an_exit_code(fault_data, undisturbed, tmp_path):
    from slope_megatron.training.checkpoint import store

    run = tmp_path / "run"
    ended = ranks.start(ranks.settings(fault_data, run, 1), tmp_path / "logs", prepare_rank=disk_full_from_step_8)
    assert ended.codes == [74, 74], ended.said
    assert "slope: error: the last checkpoint could not be written: rank 0: No space left on device" in ended.said
    assert ranks.losses(run) == undisturbed(1)
    assert store.newest(run).name == "step_00000006" and not (run / "DONE").exists()
    again = ranks.start(ranks.settings(fault_data, run, 1, resume=True), tmp_path / "logs")
    assert again.codes == [0, 0] and (run / "DONE").exists()
    assert ranks.losses(run) == undisturbed(1)


def stuck_in_step_6(rank):
    """The second rank's main thread sleeps for ever; its heartbeat goes on."""
    from slope_megatron.training.zero import gradients

    original, calls = gradients.sum_sequence_parallel, []

    def stuck(model):
        calls.append(model)
        if rank == 1 and len(calls) == 6:
            time.sleep(1000)
        return original(model)

    gradients.sum_sequence_parallel = stuck


@pytest.mark.slow
def test_a_stuck_rank_is_named_with_the_place(fault_data, tmp_path):
    ended = ranks.start(
        ranks.settings(fault_data, tmp_path / "run", 1, hang_timeout=ranks.HANG_TIMEOUT),
        tmp_path / "logs",
        prepare_rank=stuck_in_step_6,
    )
    assert ended.codes == [70, 70], ended.said
    [said] = [line for line in ended.said.splitlines() if line.startswith("slope: error: ")]
    assert "slope: error: rank 1 (process" in said and "rank 0" not in said
    assert "in step 6, gradients, at training/" in said
    assert f"hangs: no progress for more than {ranks.HANG_TIMEOUT:g} seconds (--hang-timeout)" in said


def hardly_any_space(rank):
    import shutil
    import types

    shutil.disk_usage = lambda folder: types.SimpleNamespace(free=2**20)


@pytest.mark.slow
def test_a_run_whose_checkpoints_cannot_fit_is_refused_and_leaves_nothing(fault_data, tmp_path):
    run = tmp_path / "run"
    ended = ranks.start(ranks.settings(fault_data, run, 1), tmp_path / "logs", prepare_rank=hardly_any_space)
    assert ended.codes == [2, 2]
    said = [line for line in ended.said.splitlines() if line.startswith("slope: error: ")]
    assert said and all("GiB free and the run needs about" in line for line in said)
    assert not run.exists()
    assert ranks.start(ranks.settings(fault_data, run, 1, stop_at=1), tmp_path / "logs").codes == [0, 0]


def second_is_slow_to_leave(rank):
    """The only checkpoint is whole when it is looked at and cannot be read when it is loaded, by the second rank; that
    one hears the end later than the first."""
    from slope_megatron.storage import tensors
    from slope_megatron.training.checkpoint import recovery

    original = recovery.newest_good

    def slow(*arguments):
        try:
            return original(*arguments)
        except ValueError:
            time.sleep(4 * rank)
            raise

    def failing(self, file, info):
        raise OSError(errno.EIO, "Input/output error")

    recovery.newest_good = slow
    if rank == 1:
        tensors.CheckedReader._slice_file = failing


def refused_start(rank):
    """--init-from names what this run cannot start from, which the second rank hears later."""
    from slope_megatron.training import pretrain

    def refuse(*_):
        time.sleep(4 * rank)
        raise ValueError("the weights are of another model: give another --init-from")

    pretrain.check_init = lambda *_: None
    pretrain.load_init = refuse
    if rank == 1:
        leave = pretrain.leave
        pretrain.leave = lambda watch: (time.sleep(2), leave(watch))


def test_ranks_that_refuse_a_checkpoint_while_loading_leave_in_order(fault_data, tmp_path):
    run = tmp_path / "run"
    assert ranks.start(ranks.settings(fault_data, run, 1, stop_at=2), tmp_path / "logs").codes == [0, 0]
    config = ranks.settings(fault_data, run, 1, auto_resume=True)
    ended = ranks.start(config, tmp_path / "logs", prepare_rank=second_is_slow_to_leave)
    assert ended.codes == [2, 2], ended.said
    said = [line for line in ended.said.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 2 and all(f"no checkpoint of {run} is intact (1 looked at)" in line for line in said)
    assert not (run / "ranks" / "failure.txt").exists() and not list((run / "ranks").glob("rank_*"))
    # It was the disk's fault: once that reads again, the run goes on.
    assert ranks.start(config, tmp_path / "logs").codes == [0, 0]


def test_ranks_that_refuse_what_to_start_from_leave_in_order_and_leave_nothing(fault_data, tmp_path):
    run = tmp_path / "run"
    config = ranks.settings(fault_data, run, 1, init_from=str(tmp_path))
    ended = ranks.start(config, tmp_path / "logs", prepare_rank=refused_start)
    assert ended.codes == [2, 2], ended.said
    said = [line for line in ended.said.splitlines() if line.startswith("slope: error: ")]
    assert said == ["slope: error: the weights are of another model: give another --init-from"] * 2
    assert not run.exists()
