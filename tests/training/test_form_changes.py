"""Whole runs whose model changes its form: a dense start is pruned, a dense tail grows."""

import dataclasses
import errno
import functools
import json
import os
import shutil

import pytest
import torch
from test_pretrain import MODEL, RUN, losses, metrics, slope

from helpers import commands
from helpers.fake_graphs import fake_graphs
from helpers.models import build_engine, go_on, small_config
from slope_megatron.export.trained_run import TrainedRun

PHASES = ["--slope-dense-start", 0.25, "--slope-dense-tail", 0.25]


def test_a_run_changes_its_form(corpus, tmp_path):
    """The same losses whole and in pieces, also where no other checkpoint is asked for."""
    common = ["--data", corpus, *MODEL, *RUN, *PHASES, "--layer-stats-interval", 2, "--log-interval", 1]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = slope(*common, "--out", whole, "--save-interval", 0)
    assert done.returncode == 0, done.stderr
    assert "outlive" not in done.stderr
    # Those of steps 2 and 6 are not the run's result, which nobody asked for.
    assert not list((whole / "checkpoints").iterdir()) and (whole / "DONE").is_file()
    for stop in (2, 4, 6, 8):
        more = ["--save-interval", 1, "--keep-checkpoints", 9, "--stop-at", stop, *(["--resume"] if stop > 2 else [])]
        assert slope(*common, "--out", parted, *more).returncode == 0
    assert losses(parted) == losses(whole) and list(losses(whole)) == list(range(1, 9))
    lines = metrics(whole)
    assert [(line["step"], line["form"]) for line in lines if "form" in line] == [(2, "sparse"), (6, "dense")]
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 6, 8]
    layers = [line["layers"] for line in lines if "layers" in line]
    assert layers == [line["layers"] for line in metrics(parted) if "layers" in line]
    energy = ["energy_lost" in entry["decoder.layers.1.mlp.linear_fc1.weight"] for entry in layers]
    assert energy == [False, True, True, False]
    # Neither what was pruned nor what has grown began as it is.
    drifts = ["drift" in entry["decoder.layers.1.mlp.linear_fc1.weight"] for entry in layers]
    assert drifts == [True, False, False, False]
    summary = json.loads((whole / "summary.json").read_text())
    again = json.loads((parted / "summary.json").read_text())
    assert summary["val_loss"] == again["val_loss"] and summary["parameters"] == again["parameters"]
    assert summary["double_pruning"] is None and summary["unsaved"] == "--save-interval is 0"
    # One start, whatever the form; a start for each piece.
    assert [attempt["to_step"] for attempt in summary["attempts"]] == [8]
    assert [attempt["to_step"] for attempt in again["attempts"]] == [2, 4, 6, 8]
    # What each form held; the dense one is the last.
    held = [attempt["state_bytes"] for attempt in again["attempts"]]
    assert held[0] == held[3] == sum(summary["state_bytes"]["model"].values()) and held[1] == held[2] != held[0]
    assert summary["attempts"][0]["state_bytes"] == max(held)
    # Both forms can be read as what they are.
    forms = {step: TrainedRun(parted, step) for step in (7, 8)}
    assert not any(run.is_packed(name) or run.config.slope.enabled for run in forms.values() for name in run)
    assert TrainedRun(parted, 6).is_packed("decoder.layers.1.mlp.linear_fc1.weight")


def refuse_to_read(name):
    from slope_megatron.storage.tensors import CheckedReader

    whole = CheckedReader._slice_file

    def failing(self, file, info):
        if name in str(self.folder):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(self, file, info)

    CheckedReader._slice_file = failing


def test_a_checkpoint_before_a_damaged_one_may_be_of_the_other_form(corpus, tmp_path):
    """Step 7 is of the dense tail, and cannot be read; step 5 is sparse."""
    common = ["--data", corpus, *MODEL, *RUN, *PHASES, "--log-interval", 1, "--save-interval", 1]
    common += ["--keep-checkpoints", 9, "--out", tmp_path, "--auto-resume"]
    assert slope(*common, "--stop-at", 7).returncode == 0
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    before = losses(tmp_path)
    done = commands.slope("pretrain", *common, before=functools.partial(refuse_to_read, "step_00000007"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoints" / "step_00000007.corrupt").is_dir()
    after = [(line["step"], line["loss"]) for line in metrics(tmp_path) if "loss" in line][-3:]
    assert [step for step, _ in after] == [6, 7, 8]
    assert after[:2] == [(6, before[6]), (7, before[7])]


def test_a_change_of_form_that_cannot_be_read_ends_the_run(corpus, tmp_path):
    """And does not train the steps before it for ever; once the disk reads again, the run is the undisturbed one."""
    common = ["--data", corpus, *MODEL, *RUN, *PHASES, "--log-interval", 1, "--save-interval", 1]
    common += ["--keep-checkpoints", 9, "--out", tmp_path / "run", "--auto-resume"]
    failed = commands.slope("pretrain", *common, before=functools.partial(refuse_to_read, "step_00000002"))
    assert failed.returncode == 2, failed.stderr
    said = [line for line in failed.stderr.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1 and said[0].startswith(
        "slope: error: step 2 is to be trained in the model's other form, and its checkpoint cannot be read: the run "
        "ends. Checkpoint "
    )
    assert said[0].endswith("step_00000001 is complete: the same command with --resume goes on from it.")
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")}
    assert names == {"step_00000001", "step_00000002.corrupt"}
    assert list(losses(tmp_path / "run")) == [1, 2]
    assert slope(*common).returncode == 0
    undisturbed = [*common[:-2], tmp_path / "whole"]
    assert slope(*undisturbed).returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_what_cannot_run_the_sparse_steps_is_refused_before_the_dense_ones(corpus, tmp_path):
    run = tmp_path / "run"
    common = ["--data", corpus, *MODEL, *RUN, *PHASES, "--log-interval", 1, "--out", run]
    refused = slope(*common, "--slope-backend", "cusparselt")
    assert refused.returncode == 2, refused.stderr
    said = [line for line in refused.stderr.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1 and said[0].startswith("slope: error: --slope-backend cusparselt cannot run here: ")
    assert not run.exists()


def refuse_to_write(name):
    from slope_megatron.training.checkpoint.snapshot import Snapshot

    whole = Snapshot.write

    def failing(self, folder):
        if name in str(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, folder)

    Snapshot.write = failing


def test_a_change_of_form_that_cannot_be_saved_ends_the_run(corpus, tmp_path):
    common = ["--data", corpus, *MODEL, *RUN, *PHASES, "--log-interval", 1, "--out", tmp_path]
    failed = commands.slope("pretrain", *common, before=functools.partial(refuse_to_write, "step_00000002"))
    assert failed.returncode == 74, failed.stderr
    assert "step_00000002 could not be written (rank 0: No space left on device): there is none" in failed.stderr
    assert "from that checkpoint: the run ends" in failed.stderr and "the run goes on" not in failed.stderr
    assert list(losses(tmp_path)) == [1, 2]


def say_when_it_is_watched():
    """At each engine's build, and as each step begins, whether a main thread that stands still ends the run."""
    from slope_megatron.training.engine import Engine
    from slope_megatron.training.watch.rank_watch import RankWatch

    watches, begun, built, stepped = [], RankWatch.start, Engine.__init__, Engine.train_step

    def start(self):
        watches.append(self)
        begun(self)

    def build(self, *arguments):
        print("engine", watches[0].pulse.watched)
        built(self, *arguments)

    def step(self, batches):
        print(self.steps_done, watches[0].pulse.watched)
        return stepped(self, batches)

    RankWatch.start, Engine.__init__, Engine.train_step = start, build, step


def test_an_engine_s_build_and_first_step_are_not_watched(corpus, tmp_path):
    common = ["--data", corpus, *MODEL, *RUN, *PHASES, "--out", tmp_path, "--hang-timeout", 600]
    done = commands.slope("pretrain", *common, before=say_when_it_is_watched)
    assert done.returncode == 0, done.stderr
    parts = ("engine", 0, 1, "engine", 2, 3, 4, 5, "engine", 6, 7)
    said = [line for line in done.stdout.splitlines() if line.endswith(("True", "False"))]
    assert said == [f"{part} {part in (1, 3, 4, 5, 7)}" for part in parts]


def graphs_of_both_forms(config):
    """An engine's graphs while it trains and once it is let go; what outlives it; and the next engine's graphs."""
    from slope_megatron.training.teardown import Remains

    found = []
    with fake_graphs() as made:
        for step in (0, *config.switches):
            engine = build_engine(config, torch.bfloat16, first_step=step)
            engine.steps_done = step
            go_on(engine, step + 4)
            graphs = engine.graphs
            captured = [function.what for function in graphs.functions if function.graph is not None]
            remains = Remains(engine)
            del engine
            left = [function.graph for function in graphs.functions]
            del graphs
            made.clear()  # the test's own list
            found.append((captured, left, remains.alive()))
    return found


def test_an_engine_that_is_let_go_drops_its_graphs(ranks):
    config = small_config(slope={"dense_tail": 0.5}, steps=8)
    found = ranks.run(graphs_of_both_forms, config, world=1)[0]
    assert len(found) == 2
    for captured, left, outlives in found:
        assert "training" in captured and set(left) == {None} and outlives == ""


def outliving(config):
    """What is said of an engine that has trained two steps and is let go."""
    from slope_megatron.training.teardown import Remains

    engine = build_engine(config, torch.bfloat16)
    go_on(engine, 2)
    remains = Remains(engine)
    del engine
    return remains.alive()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_outlives_an_engine(ranks, stage):
    config = small_config(slope={"dense_tail": 0.5})
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=stage))
    assert ranks.run(outliving, config, world=2) == ["", ""]
