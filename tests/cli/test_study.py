"""`slope study` end to end on a CPU, and what it refuses."""

import shutil
from pathlib import Path

import pytest
from study.conftest import CONTENT
from study.test_runs import finish

from helpers import commands
from slope_megatron.cli.study import check_runs
from slope_megatron.config.yaml_file import read_yaml, write_yaml
from slope_megatron.data.manifest import load_manifest
from slope_megatron.storage import locks
from slope_megatron.study.rows import Rows
from slope_megatron.study.runs import Plan, fingerprint_of
from slope_megatron.study.settings import read_study

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "launch" / "study" / "toy.yaml"


def study(*arguments):
    return commands.slope("study", *arguments)


@pytest.mark.slow
def test_the_toy_study_goes_from_text_to_charts(tmp_path):
    """A sweep, two sizes and a control: seven runs of `slope pretrain`; then nothing is left to do."""
    out = tmp_path / "out"
    result = study(TOY, "--out", out, "--at-once", 2)
    assert result.returncode == 0, result.stderr
    rows = {row.name: row for row in Rows.read(out / "rows.csv").rows}
    manifest = load_manifest(out / "data")
    assert {(row.data, row.vocabulary) for row in rows.values()} == {(fingerprint_of(manifest), 512)}
    # The small size of the ladder is of the sweep's tokens: trained once.
    assert len(rows) == 7 and "sweep/50k-static-lr0.008-seed1" in rows
    for row in rows.values():
        assert row.outcome == "done" and 0 < row.val_loss < 6.5 and row.seconds > 0 and row.device == "cpu"
    dense, narrow = rows["ladder/150k-dense-lrbest-seed1"], rows["controls/50k-narrow-lrbest-seed1"]
    static = rows["ladder/150k-static-lrbest-seed1"]
    assert static.flops == dense.flops > static.actual_flops and static.tokens == dense.tokens
    assert narrow.flops == pytest.approx(rows["sweep/50k-dense-lr0.002-seed1"].flops / 1.2, rel=0.01)
    assert not [*out.glob("runs/*/*/checkpoints")] and len([*out.glob("runs/*/*/metrics.jsonl")]) == 7
    text = (out / "rows.csv").read_text()

    again = study(TOY, "--out", out)
    assert again.returncode == 0 and "0 runs without one" in again.stderr and "begins" not in again.stderr
    assert (out / "rows.csv").read_text() == text
    report = study(TOY, "--out", out, "--report")
    assert report.returncode == 0, report.stderr
    assert f"{static.val_loss:.4f}" in (out / "report.md").read_text()
    assert {path.name for path in out.glob("*.png")} == {"sweep.png", "ladder-lines.png", "costs.png"}
    # One that is left is trained alone, from the text that was tokenized before.
    shutil.copytree(out / "data", tmp_path / "other" / "data")
    write_yaml(tmp_path / "gone.yaml", read_yaml(TOY) | {"corpus": read_yaml(TOY)["corpus"] | {"source": "gone.txt"}})
    refused = study(tmp_path / "gone.yaml", "--out", tmp_path / "other")
    assert (
        refused.returncode == 2 and "source stdlib then, gone.txt now): give another --out, or --data" in refused.stderr
    )
    # It has no validation text, or none is asked for; or a run that is stopped could not go on.
    toy = read_yaml(TOY)
    for change, flags, said in (
        ({"eval_samples": 0}, [], "has eval_samples 0, and rows are validation losses"),
        ({"save_interval": 0}, ["--budget-minutes", 1], "has save_interval 0, so --budget-minutes would lose it"),
    ):
        write_yaml(tmp_path / "bad.yaml", toy | {"base": toy["base"] | {"train": toy["base"]["train"] | change}})
        refused = study(tmp_path / "bad.yaml", "--out", tmp_path / "other", *flags)
        assert refused.returncode == 2 and said in refused.stderr
    with open(tmp_path / "other" / "lock", "a") as lock:
        assert locks.take(lock, "")
        refused = study(TOY, "--out", tmp_path / "other")
        assert refused.returncode == 2 and "is in use by another `slope study`" in refused.stderr


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "study.yaml"
    write_yaml(path, CONTENT)
    return path


TWICE = ("ladder/s-dense-lrbest-seed1", "ladder/s-static-lrbest-seed1")


def test_a_dry_run_lists_runs_tokens_and_minutes(config, tmp_path):
    result = study(config, "--out", tmp_path / "out", "--dry-run", "--tflops", "1", "--at-once", 2)
    assert result.returncode == 0 and not (tmp_path / "out").exists()
    assert "is not prepared yet: 512 entries of the vocabulary are a guess" in result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + 22 + 1
    assert lines[1].split()[:4] == ["sweep/s-dense-lr0.001-seed1", "left", "0.001", "0.988"]
    # A run by itself takes one slot of two.
    own = {line.split()[0]: float(line.split()[-1]) for line in lines[1:-1]}
    once = sum(minutes for name, minutes in own.items() if name not in TWICE)
    assert own["sweep/s-dense-lr0.001-seed1"] == 0.5 and f" about {once / 2:.0f} minutes on" in lines[-1]
    assert "ladder/m-narrow-lrbest-seed2" in lines[-2] and "waits" in lines[-2] and "of sweep" in lines[-2]
    # Two of the ladder are of the sweep's settings, if its best rate is the middle one.
    assert (
        lines[-1].startswith("22 runs, 20 to train (equal ones once): ")
        and " minutes on 1 x 2 at once; by this device's rows" in lines[-1]
    )


def test_without_prepared_text_rows_tell_of_which_they_are(config, tmp_path):
    """A report may be made elsewhere, from the rows alone: keys hold the text, and controls go by its vocabulary."""
    rows = tmp_path / "rows.csv"
    plan = Plan(read_study(config), Rows.read(rows), 768, "0123456789ab")
    finish(plan.rows, plan.runs()[0], 3.0)
    flags = ["--out", tmp_path / "out", "--rows", rows, "--dry-run"]
    result = study(config, *flags)
    assert result.stdout.splitlines()[1].split()[:2] == ["sweep/s-dense-lr0.001-seed1", "done"]
    assert "is not prepared yet: 768 entries of the vocabulary are those of the text of" in result.stderr
    plan = Plan(plan.study, plan.rows, 768, "ba9876543210")
    finish(plan.rows, plan.runs()[0], 3.0)
    result = study(config, *flags)
    assert result.returncode == 2 and "has rows of 2 texts: give --data FOLDER" in result.stderr


def test_only_takes_names_by_pattern(config, tmp_path):
    flags = ["--out", tmp_path / "out", "--dry-run"]
    result = study(config, *flags, "--only", "sweep/*dense*", "--only", "*-m-static-*", "--only", "ladder/m-static*")
    assert [line.split()[0] for line in result.stdout.splitlines()[1:-1]] == [
        *(f"sweep/s-dense-lr0.00{lr}-seed1" for lr in (1, 2, 4)),
        *(f"ladder/m-static-lrbest-seed{seed}" for seed in (1, 2)),
    ]
    result = study(config, *flags, "--only", "swep/*")
    assert result.returncode == 2 and "--only swep/* fits no run of " in result.stderr


def test_text_without_validation_is_refused(monkeypatch):
    manifest = {"splits": {"train": {"tokens": 9}, "valid": {"tokens": 0}}}
    monkeypatch.setattr("slope_megatron.data.manifest.load_manifest", lambda folder: manifest)
    with pytest.raises(ValueError, match="data holds no validation text"):
        check_runs([], Path("data"), None)


BAD = [
    (["--at-once", "0"], "--at-once is 0: it must be at least 1"),
    (["--budget-minutes", "-1"], "--budget-minutes is -1.0: it must be positive"),
    (["--source", "nowhere.txt"], "nowhere.txt"),
    (["--data", "nowhere"], "data folder nowhere does not exist"),
    (["--report"], "has no row of these runs: train some first"),
]


@pytest.mark.parametrize(("flags", "said"), BAD, ids=[said[:20] for _, said in BAD])
def test_bad_input_is_one_sentence(config, tmp_path, flags, said):
    result = study(config, "--out", tmp_path / "out", *flags)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("slope: error: ")]
    assert said in line
