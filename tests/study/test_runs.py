"""Which runs a study is made of, and what their learning rates become as rows come."""

import dataclasses
import math

import pytest
from study.conftest import CONTENT, VOCABULARY

from slope_megatron.config.yaml_file import read_yaml
from slope_megatron.study import runs
from slope_megatron.study.outcome import diverged_row


def planned(study, rows):
    return runs.Plan(study, rows, VOCABULARY).runs()


def finish(rows, run, loss):
    """A row as if the run had ended with this loss; None: it diverged."""
    row = diverged_row(run, rows.path.parent / "none", 1)
    rows.append(row if loss is None else dataclasses.replace(row, outcome="done", val_loss=loss))


def sweep(study, rows, losses):
    """Finish the sweep: method -> losses by learning rate."""
    for run in planned(study, rows):
        if run.group == "sweep":
            finish(rows, run, losses[run.method][study.groups["sweep"].lr.index(run.lr)])


def test_a_group_is_a_product(study_of, no_rows):
    found = planned(study_of(), no_rows)
    names = [run.name for run in found]
    assert len(names) == len(set(names)) == 2 * 3 + 2 * 4 * 2
    assert names[:2] == ["sweep/s-dense-lr0.001-seed1", "sweep/s-dense-lr0.002-seed1"]
    # 12 h^2 a block, two norms of a weight and a bias each; 10 tokens a parameter, whole steps of 128.
    body = 2 * (12 * 64**2 + 4 * 64)
    assert found[0].body_parameters == body and found[0].config.train.steps == round(10 * body / 128)
    assert found[0].tokens == 128 * found[0].config.train.steps
    assert {run.tokens for run in found if run.size == "s"} == {found[0].tokens}, "equal tokens, whatever the method"


def test_learning_rates_wait_for_the_sweep_and_are_carried_over_sizes(study_of, no_rows):
    study = study_of()
    ladder = [run for run in planned(study, no_rows) if run.group == "ladder"]
    assert all(run.lr is None for run in ladder)
    # A diverged run counts as the worst.
    sweep(study, no_rows, {"dense": [4.0, 3.0, None], "static": [4.0, 3.0, 2.5]})
    rates = {(run.size, run.method): run for run in planned(study, no_rows) if run.group == "ladder"}
    assert rates["s", "dense"].lr == rates["s", "narrow"].lr == 2e-3
    assert rates["s", "static"].lr == rates["s", "adapted"].lr == 4e-3
    larger = rates["m", "dense"].body_parameters / rates["s", "dense"].body_parameters
    assert rates["m", "dense"].lr == pytest.approx(2e-3 / math.sqrt(larger), rel=5e-3)
    assert rates["m", "dense"].config.optimizer.lr == rates["m", "dense"].lr


def test_one_method_may_have_more_rates(study_of, no_rows):
    group = {"sizes": ["s"], "methods": ["dense", "static"], "lr": [2e-3], "tokens_per_parameter": 10}
    study = study_of(groups={"sweep": {**group, "more_lr": {"static": [4e-3, 1e-3]}}})
    found = [(run.method, run.lr) for run in planned(study, no_rows)]
    assert found == [("dense", 2e-3), ("static", 1e-3), ("static", 2e-3), ("static", 4e-3)]


def test_factors_of_the_best_rate_check_the_rule(study_of, no_rows):
    content = {"best_of": "sweep", "times": [0.5, 1, 2]}
    groups = {
        "sweep": {"sizes": ["s"], "methods": ["dense"], "lr": [1e-3], "tokens_per_parameter": 10},
        "check": {"sizes": ["m"], "methods": ["dense"], "lr": content, "tokens_per_parameter": 10},
    }
    study = study_of(groups=groups)
    finish(no_rows, planned(study, no_rows)[0], 3.0)
    found = [(run.name, run.lr) for run in planned(study, no_rows)[1:]]
    assert found == [
        ("check/m-dense-lrbestx0.5-seed1", 5e-4),
        ("check/m-dense-lrbest-seed1", 1e-3),
        ("check/m-dense-lrbestx2-seed1", 2e-3),
    ]


def test_a_sweep_that_diverged_altogether_tells_nothing(study_of, no_rows):
    study = study_of()
    sweep(study, no_rows, {"dense": [4.0, 3.0, 5.0], "static": [None, None, None]})
    rates = {run.method: run.lr for run in planned(study, no_rows) if run.group == "ladder" and run.size == "s"}
    assert rates == {"dense": 2e-3, "narrow": 2e-3, "static": None, "adapted": None}


def test_equal_settings_in_two_groups_are_one_run(study_of, no_rows):
    study = study_of()
    sweep(study, no_rows, {"dense": [4.0, 3.0, 5.0], "static": [4.0, 3.0, 5.0]})
    again = next(run for run in planned(study, no_rows) if run.name == "ladder/s-dense-lrbest-seed1")
    row = no_rows.find(again.key)
    assert row is not None and row.name == "sweep/s-dense-lr0.002-seed1"
    others = {run.key for run in planned(study, no_rows) if run.seed == 2}
    assert not others & no_rows.by_key.keys()


def test_rows_of_another_text_are_not_this_runs(study_of, no_rows, tmp_path):
    manifest = {"files": {"train.bin": {"sha256": "a", "bytes": 1}, "tokenizer.json": {"sha256": "b", "bytes": 1}}}
    other = {"files": {**manifest["files"], "tokenizer.json": {"sha256": "c", "bytes": 1}}}
    texts = [runs.fingerprint_of(manifest), runs.fingerprint_of(other)]
    first, second = (runs.Plan(study_of(), no_rows, VOCABULARY, text).runs()[0] for text in texts)
    finish(no_rows, first, 3.0)
    assert first.settings == second.settings and first.folder(tmp_path) != second.folder(tmp_path)
    assert no_rows.find(first.key).data == texts[0] and no_rows.find(second.key) is None


def test_a_control_of_flops_knows_dense_steps(study_of, no_rows):
    """Narrowed to what a method with a dense half costs as a whole, it is wider than beside one without."""
    narrow = {"to": "flops", "of": "tail", "speedup": "whole"}
    methods = {
        "tail": {"slope": {"dense_tail": 0.5}, "like": "static", "time_as": "static"},
        "of-tail": {**CONTENT["methods"]["narrow"], "narrow": narrow},
    }
    group = {"sizes": ["m"], "methods": ["dense", "narrow", "of-tail"], "lr": [1e-3], "tokens_per_parameter": 10}
    study = study_of(methods=CONTENT["methods"] | methods, groups={"one": group}, speedups={"whole": {"static": 1.5}})
    dense, narrow, of_tail = planned(study, no_rows)
    assert narrow.flops == pytest.approx(dense.flops / 1.5, rel=0.01)
    assert of_tail.flops == pytest.approx(dense.flops * (0.5 + 0.5 / 1.5), rel=0.01)


def test_a_settings_file_is_what_the_run_was_checked_as(study_of, no_rows, tmp_path):
    run = planned(study_of(), no_rows)[3]
    path = tmp_path / "run.yaml"
    run.write_settings(path, tmp_path / "data", tmp_path / "run")
    content = read_yaml(path)
    assert content["data"].pop("data") == str(tmp_path / "data")
    assert content["train"].pop("out") == str(tmp_path / "run")
    assert runs.config_of(content) == run.config and content == run.settings


def test_a_contradiction_names_the_run(study_of, no_rows):
    study = study_of(sizes={"s": {"num_layers": 2, "hidden_size": 66}, "m": {"num_layers": 2}})
    with pytest.raises(ValueError, match=r"run sweep/s-static-lr0\.001-seed1: --hidden-size is 66"):
        planned(study, no_rows)
