"""Whole runs whose model changes its form: a dense start is pruned, a dense tail grows."""

import json

from test_pretrain import MODEL, RUN, losses, metrics, slope

from slope_megatron.export.trained_run import TrainedRun


def test_a_run_changes_its_form(corpus, tmp_path):
    """From the command line: the same losses whole and in pieces, also where no other checkpoint is asked for."""
    phases = ["--slope-dense-start", 0.25, "--slope-dense-tail", 0.25, "--layer-stats-interval", 2]
    common = ["--data", corpus, *MODEL, *RUN, *phases, "--log-interval", 1]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = slope(*common, "--out", whole, "--save-interval", 0)
    assert done.returncode == 0, done.stderr
    assert "outlive" not in done.stderr
    assert {path.name for path in (whole / "checkpoints").glob("step_*")} == {"step_00000002", "step_00000006"}
    for stop in (2, 4, 6, 8):
        more = ["--save-interval", 1, "--stop-at", stop, *(["--resume"] if stop > 2 else [])]
        assert slope(*common, "--out", parted, *more).returncode == 0
    assert losses(parted) == losses(whole) and list(losses(whole)) == list(range(1, 9))
    lines = metrics(whole)
    assert [(line["step"], line["form"]) for line in lines if "form" in line] == [(2, "sparse"), (6, "dense")]
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 6, 8]
    layers = [line["layers"] for line in lines if "layers" in line]
    assert layers == [line["layers"] for line in metrics(parted) if "layers" in line]
    energy = ["energy_lost" in entry["decoder.layers.1.mlp.linear_fc1.weight"] for entry in layers]
    assert energy == [False, True, True, False]
    summary = json.loads((whole / "summary.json").read_text())
    again = json.loads((parted / "summary.json").read_text())
    assert summary["val_loss"] == again["val_loss"] and summary["parameters"] == again["parameters"]
    assert summary["double_pruning"] is None and summary["unsaved"] == "--save-interval is 0"
    # One start, whatever the form; a start for each piece.
    assert [attempt["to_step"] for attempt in summary["attempts"]] == [8]
    assert [attempt["to_step"] for attempt in again["attempts"]] == [2, 4, 6, 8]
    # Both forms can be read as what they are.
    forms = {step: TrainedRun(parted, step) for step in (7, 8)}
    assert not any(run.is_packed(name) or run.config.slope.enabled for run in forms.values() for name in run)
    assert TrainedRun(whole, 6).is_packed("decoder.layers.1.mlp.linear_fc1.weight")
