"""The studies that come with the package: all of their runs are ones that `slope pretrain` takes."""

import csv
from pathlib import Path

import pytest

from slope_megatron.study import controls, runs
from slope_megatron.study.settings import BestOf, read_study

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "study"
STUDIES = sorted(FOLDER.glob("*.yaml"))
VOCABULARY = 16384


@pytest.fixture(scope="module")
def accuracy():
    return read_study(FOLDER / "accuracy.yaml")


@pytest.fixture
def planned(accuracy, no_rows):
    return runs.Plan(accuracy, no_rows, VOCABULARY).runs()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_is_one(path, no_rows):
    study = read_study(path)
    found = runs.Plan(study, no_rows, study.corpus["vocab_size"]).runs()
    assert len({run.name for run in found}) == len(found) > 5


def test_a_study_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read_study(Path("study/toy")).sizes == read_study(FOLDER / "toy.yaml").sizes


def test_sizes_are_what_they_are_called(accuracy, no_rows):
    for size, parameters in runs.Plan(accuracy, no_rows, VOCABULARY).parameters.items():
        assert parameters == pytest.approx(float(size.removesuffix("m")) * 1e6, rel=0.025), size


def test_every_method_that_has_its_own_rate_is_swept(accuracy):
    sweep = accuracy.groups["sweep"]
    used = {method for group in accuracy.groups.values() for method in group.methods}
    assert used == accuracy.methods.keys() and {accuracy.tuned_as(method) for method in used} == set(sweep.methods)
    assert len(sweep.lr) >= 5 and all(isinstance(group.lr, BestOf) for group in list(accuracy.groups.values())[1:])


def test_the_text_lasts_for_four_epochs(planned):
    """Of 75 million tokens; the largest size, for which budget may be left, excepted."""
    assert max(run.tokens for run in planned if run.group != "larger") <= 4.1 * 75e6


def test_speedups_are_those_that_were_measured(accuracy):
    modes = {"static": "paper", "full": "full", "e4m3": "fp8"}
    assert len(accuracy.speedups) == 3
    for model, speedups in accuracy.speedups.items():
        file = "llama-3-8b-16-layers" if model == "llama-3-8b" else model
        lines = (ROOT / "kernels" / "results" / "models" / f"{file}.csv").read_text().splitlines()
        ratios = {row["mode"]: float(row["ratio"]) for row in csv.DictReader(lines[1:])}
        assert speedups == {method: ratios[mode] for method, mode in modes.items()}


def test_controls_cost_what_they_are_called_after(accuracy, planned):
    """Beside the dense and the static model of that size."""
    first = {run.method: run for run in planned if run.size == "8m" and run.group in ("ladder", "controls")}
    dense, static = first["dense"].config, first["static"].config
    for method in ("time-gpt2-small", "time-opt-2.6b", "time-llama-3-8b", "memory", "parameters"):
        narrow = accuracy.methods[method].narrow
        cost = controls.COSTS[narrow.to]
        gain = accuracy.speedups[narrow.speedup]["static"] if narrow.speedup else None
        wanted = cost(dense, VOCABULARY) / gain if gain else cost(static, VOCABULARY)
        assert cost(first[method].config, VOCABULARY) == pytest.approx(wanted, rel=controls.TOLERANCE)
        assert first[method].tokens == first["dense"].tokens and not first[method].config.slope.enabled
