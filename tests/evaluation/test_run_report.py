"""`slope report`: figures as the runs have them, what is missing named, one picture."""

import json

import pytest

from slope_megatron.cli import main


def write_run(folder, loss, *, metrics=True, summary=True, config=None, scores=None):
    folder.mkdir(parents=True)
    described = {"config": config or {"slope": {"enabled": True}}, "dtype": "fp32", "versions": {"torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps(described))
    if metrics:
        lines = [{"step": step, "loss": loss + 3 / step} for step in range(1, 21)]
        lines.append({"step": 20, "val_loss": loss})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    if summary:
        sizes = {kind: int(1000 * loss) for kind in ("weights", "patterns", "operands", "gradients", "optimizer")}
        content = {
            "steps": 20, "tokens": 4096, "val_loss": loss, "tokens_per_second": 1234.5, "parameters": 777,
            "train_seconds": 9.0, "state_bytes": {"sparse_layers": sizes, "model": sizes}, "backend": "reference",
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(content))
    for name, found in (scores or {}).items():
        (folder / "scores").mkdir(exist_ok=True)
        (folder / "scores" / f"{name}.json").write_text(json.dumps({"name": name, "scores": found}))


def test_runs_side_by_side(tmp_path, capsys):
    write_run(tmp_path / "a" / "sparse", 2.0, scores={"lm": {"piqa": {"acc": 0.5761}}, "squad": {"f1": 77.25}})
    write_run(tmp_path / "a" / "dense", 4.0, config={"slope": {"enabled": False}})
    write_run(tmp_path / "b" / "dense", 1.0, metrics=False, summary=False)
    runs = [str(tmp_path / name) for name in ("a/sparse", "a/dense", "b/dense")]
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| a/sparse | 2.0000 | 7.39 | 20 | 4,096 | 1,234 | 777 | 9 |" in text
    assert "| b/dense | - | - | - | - | - | - | - |" in text
    assert "- b/dense has no summary.json, metrics.jsonl" in text
    assert "| 2:4 linears (dense: the same ones): weights | 2,000 | 4,000 | 0.5000 |" in text
    assert "| lm: piqa/acc | 0.5761 | - | - |" in text and "| squad: f1 | 77.2500 | - | - |" in text
    assert "| slope.enabled | True | False | True |" in text and "torch 2.13.0" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["a/dense"]["summary"]["val_loss"] == 4.0
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 2
    assert "holds a report already" in capsys.readouterr().err
    assert main(["report", *runs, "--out", str(tmp_path / "out"), "--overwrite"]) == 0


def test_a_setting_that_a_run_is_older_than_is_no_difference(tmp_path):
    from slope_megatron.evaluation.run_report import differences, read_run

    write_run(tmp_path / "old", 2.0, config={"slope": {"nm": "2:4"}})
    write_run(tmp_path / "new", 2.0, config={"slope": {"nm": "2:4", "fp8": "off"}, "train": {"seed": 7, "later": 1}})
    text = differences([read_run(tmp_path / name, name) for name in ("old", "new")])
    assert "fp8" not in text and "| train.seed | 1234 | 7 |" in text and "| train.later | - | 1 |" in text


@pytest.mark.parametrize("content", [{}, {"notes.txt": "x"}])
def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run: it has none of" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is no folder: give run folders" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path}/file is a file; give the path of a folder" in capsys.readouterr().err


def test_damaged_files_are_named(tmp_path):
    from slope_megatron.evaluation.run_report import read_run
    from slope_megatron.evaluation.scores import read_scores, write_scores

    write_run(tmp_path / "run", 2.0)
    (tmp_path / "run" / "summary.json").write_text("{")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b'not json\n{"step": 3, "val_loss": 2.5}\n\xff\n')
    record = read_run(tmp_path / "run", "run")
    damaged = "2 lines of metrics.jsonl (damaged, passed over)"
    assert record.missing == ("summary.json (damaged)", damaged) and record.val_loss == 2.5
    write_scores(tmp_path / "run", "squad", tmp_path, {"lr": 1}, {"f1": 1.5, "deep": {"acc": 2}})
    (tmp_path / "run" / "scores" / "bad.json").write_text("[]")
    assert read_scores(tmp_path / "run") == {"squad": {"f1": 1.5, "deep/acc": 2.0}}


def test_a_score_of_other_settings_is_kept(tmp_path, caplog):
    """A quick look with --limit costs nobody the whole evaluation."""
    from slope_megatron.evaluation.scores import read_scores, write_scores

    for settings, score in (({"limit": None}, 0.75), ({"limit": None}, 0.5), ({"limit": 10}, 0.25)):
        write_scores(tmp_path, "lm", tmp_path, settings, {"acc": score})
    assert read_scores(tmp_path) == {"lm": {"acc": 0.25}}
    [kept] = (tmp_path / "scores" / "earlier").iterdir()
    assert kept.name == "lm-1.json" and json.loads(kept.read_text())["scores"] == {"acc": 0.5}
    assert "it was measured on another model or with other settings; it is kept as" in caplog.text


def test_a_loss_that_was_not_finite_leaves_a_gap_in_the_plot(tmp_path):
    from slope_megatron.evaluation.plots import plot_runs
    from slope_megatron.evaluation.run_report import read_run

    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "val_loss": None}]
    (tmp_path / "metrics.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + b"\xff\n")
    plot_runs([read_run(tmp_path, "run")], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]
