"""Runs as processes: rows, failures that cost themselves alone, budgets, what is gone on with. A script stands for
`slope pretrain`: it writes the files that the study reads, and ends as it is told by the run's learning rate."""

import dataclasses
import sys

import pytest
from study.conftest import VOCABULARY

from slope_megatron.bench.progress import Clock
from slope_megatron.cli import pretrain, study
from slope_megatron.study import outcome, runs, work
from slope_megatron.study.rows import Rows
from slope_megatron.study.work import Place, Work

SCRIPT = """
import json, os, pathlib, signal, sys, time, yaml
settings = yaml.safe_load(open(sys.argv[-1]))
folder, steps = pathlib.Path(settings["train"]["out"]), settings["train"]["steps"]
folder.mkdir(parents=True, exist_ok=True)
(folder / "checkpoints").mkdir(exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write(f"{os.environ['RANK']} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ['OMP_NUM_THREADS']}\\n")
lr = settings["optimizer"]["lr"]
(folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 5.5}) + "\\n")
if lr == 0.001:
    print("slope: error: the device is gone", file=sys.stderr)
    sys.exit(2)
if lr == 0.002:
    sys.exit(65)
if lr == 0.009:
    sys.exit(75)
if lr == 0.004 and not (folder / "saved").exists():
    def stop(*_):
        (folder / "saved").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / "waits").touch()
    time.sleep(60)
tokens = steps * settings["data"]["global_batch_size"] * settings["data"]["seq_length"]
state = {"weights": 10, "patterns": 1, "operands": 0, "gradients": 5, "optimizer": 4}
summary = {"steps": steps, "tokens": tokens, "val_loss": 3.5, "state_bytes": {"model": state}, "train_seconds": 2.0,
           "device": "cpu", "parameters": 7, "tokens_per_second": 9.5, "bad_steps": 0}
if lr == 0.008:
    summary["val_loss"] = float("nan")
(folder / "summary.json").write_text(json.dumps(summary))
(folder / "DONE").write_text("done")
"""


@pytest.fixture
def worked(study_of, tmp_path, monkeypatch):
    """`worked(rates, slots=, budget=)`: one call of the study over a sweep of the dense model."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(work, "PRETRAIN", (sys.executable, str(script)))
    monkeypatch.setattr(work, "LEAST_SECONDS", 0.0)

    def call(rates, slots=(None, None), budget=None, more=()):
        group = {"sizes": ["s"], "methods": ["dense"], "lr": rates, "tokens_per_parameter": 10}
        study = study_of(groups={"sweep": group, **dict(more)})
        rows = Rows.read(tmp_path / "rows.csv")
        place = Place(tmp_path, tmp_path / "data", slots, len(slots))
        one = Work(runs.Plan(study, rows, VOCABULARY).runs, rows, place, Clock(budget), lambda _: 0.0)
        one.do()
        return one

    return call


def folder_of(one, lr):
    return next(run for run in one.plan() if run.lr == lr).folder(one.place.out)


def test_codes_are_those_of_pretrain():
    assert (work.DIVERGED, work.STOPPED_EARLY) == (pretrain.DIVERGED, pretrain.STOPPED_EARLY)


def test_a_run_that_fails_costs_itself_alone(worked, capfd):
    one = worked([1e-3, 2e-3, 3e-3, 5e-3])
    found = {row.lr: row for row in Rows.read(one.rows.path).rows}
    assert found.keys() == {2e-3, 3e-3, 5e-3}
    assert (found[2e-3].outcome, found[2e-3].val_loss, found[2e-3].train_loss) == ("diverged", None, 5.5)
    done = found[3e-3]
    assert (done.outcome, done.val_loss, done.state_bytes, done.seconds) == ("done", 3.5, 20, 2.0)
    assert done.flops == done.actual_flops > 0 and done.tokens == one.plan()[2].tokens
    (reason,) = one.failed.values()
    assert reason.startswith("sweep/s-dense-lr0.001-seed1 ended with code 2: the device is gone (its log: ")
    assert [run.lr for run in one.todo()] == [1e-3]
    assert f"failed: {reason}" in capfd.readouterr().err
    # What has a row keeps its metrics, and no checkpoints.
    assert (folder_of(one, 3e-3) / "metrics.jsonl").exists() and not (folder_of(one, 3e-3) / "checkpoints").exists()
    assert (folder_of(one, 1e-3) / "checkpoints").exists() and not (folder_of(one, 2e-3) / "checkpoints").exists()


def test_rows_that_exist_are_skipped_and_failures_tried_again(worked):
    rates = [1e-3, 3e-3]
    before = worked(rates)
    text = before.rows.path.read_text()
    one = worked(rates)
    assert one.rows.path.read_text() == text and len(one.failed) == 1
    assert len((folder_of(one, 3e-3) / "starts").read_text().splitlines()) == 1
    assert len((folder_of(one, 1e-3) / "starts").read_text().splitlines()) == 2


def test_a_spent_budget_stops_runs_which_then_go_on(worked, capfd):
    one = worked([4e-3, 3e-3], budget=4.0)
    assert (folder_of(one, 4e-3) / "saved").exists() and not one.failed
    assert [row.lr for row in one.rows.rows] == [3e-3]
    assert "the budget is spent" in capfd.readouterr().err
    again = worked([4e-3, 3e-3])
    assert [row.lr for row in again.rows.rows] == [3e-3, 4e-3]


def test_nothing_is_begun_with_little_left(worked, monkeypatch):
    monkeypatch.setattr(work, "LEAST_SECONDS", 30.0)
    one = worked([3e-3], budget=20.0)
    assert not one.rows.rows and len(one.todo()) == 1


def test_each_run_has_its_gpu_and_its_share_of_the_cores(worked, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(work, "available_cores", lambda: 16)
    one = worked([3e-3, 5e-3, 6e-3, 7e-3], slots=("4", "4", "5", "5"))
    starts = sorted((folder_of(one, run.lr) / "starts").read_text() for run in one.plan())
    assert starts == ["0 4 4\n", "0 4 4\n", "0 5 4\n", "0 5 4\n"]


def test_a_run_shares_its_device_with_those_that_were_there(worked):
    """What is free, or on another device, takes nothing from it."""
    (row,) = worked([3e-3]).rows.rows
    assert row.at_once == 1
    one = worked([5e-3, 6e-3], slots=("4", "5"))
    assert [one.rows.find(run.key).at_once for run in one.plan()] == [1, 1]
    one.running = {0: work.Started(None, None, None), 1: work.Started(None, None, None)}
    one.note_sharing()
    one.place = dataclasses.replace(one.place, slots=("4", "4"))
    one.note_sharing(), one.note_sharing()
    assert [started.sharing for started in one.running.values()] == [[1, 2, 2]] * 2
    assert one.running[0].at_once == 2


def test_a_run_that_ended_unnoticed_is_not_trained_again(worked):
    """Its files are complete, but the call was killed before the row was written."""
    before = worked([3e-3])
    before.rows.path.unlink()
    one = worked([3e-3])
    assert [row.val_loss for row in one.rows.rows] == [3.5]
    assert len((folder_of(one, 3e-3) / "starts").read_text().splitlines()) == 1


def test_runs_that_wait_for_a_row_begin_once_it_is_taken(worked):
    """Also if all that had ended unnoticed leaves nothing running."""
    ladder = {"sizes": ["m"], "methods": ["dense"], "lr": {"best_of": "sweep"}, "tokens_per_parameter": 10}
    before = worked([3e-3])
    before.rows.path.unlink()
    one = worked([3e-3], more={"ladder": ladder})
    assert [row.name for row in one.rows.rows] == ["sweep/s-dense-lr0.003-seed1", "ladder/m-dense-lrbest-seed1"]


def test_a_run_that_others_stopped_has_not_failed(worked, capfd):
    one = worked([9e-3, 3e-3])
    assert not one.failed and [row.lr for row in one.rows.rows] == [3e-3]
    assert list(one.stopped.values()) == ["sweep/s-dense-lr0.009-seed1 was stopped; the same command goes on with it"]
    assert study.conclude(None, one, one.clock) == study.UNFINISHED
    assert one.stopped.popitem()[1] in capfd.readouterr().err


def test_a_last_loss_that_is_not_finite_is_a_divergence(worked):
    (row,) = worked([8e-3]).rows.rows
    assert (row.outcome, row.val_loss, row.seconds) == ("diverged", None, 2.0)


def test_state_is_that_of_the_form_that_held_most():
    summary = {"state_bytes": {"model": {"weights": 10, "optimizer": 4}}}
    assert outcome.most_state(summary) == 14
    held = [{"state_bytes": 20}, {}, {"state_bytes": 12}]
    assert outcome.most_state({**summary, "attempts": held}) == 20


def test_a_summary_that_is_damaged_fails_the_run(worked):
    before = worked([3e-3])
    before.rows.path.unlink()
    (folder_of(before, 3e-3) / "summary.json").write_text("{")
    one = worked([3e-3])
    (reason,) = one.failed.values()
    assert "summary.json is damaged" in reason and not one.rows.rows


def test_an_interruption_stops_the_runs(worked, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(work.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        worked([3e-3])
