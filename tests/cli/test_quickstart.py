"""`slope quickstart` in miniature, its report, and what it refuses."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import commands

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
# Validation is of 32,768 tokens: few samples are long ones.
SMALL = "--hidden 64 --layers 1 --vocab-size 512 --seq-length 128 --global-batch-size 8 --dtype fp32".split()


def quickstart(*arguments):
    return commands.slope("quickstart", *arguments)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    import sysconfig

    folder = tmp_path_factory.mktemp("texts")
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
def test_two_runs_and_a_report(texts, tmp_path):
    out = tmp_path / "out"
    result = quickstart("--source", texts, "--out", out, "--steps", 8, *SMALL)
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    for scope in ("sparse_layers", "model"):
        for kind in ("weights", "gradients", "optimizer"):
            assert 0 < summary["sparse"]["state_bytes"][scope][kind] < summary["dense"]["state_bytes"][scope][kind]
    sparse, dense = (summary[name]["state_bytes"]["sparse_layers"] for name in ("sparse", "dense"))
    assert 2 * sparse["optimizer"] == dense["optimizer"]
    assert summary["sparse"]["tokens"] == summary["dense"]["tokens"] == 8 * 8 * 128
    assert 0 < summary["sparse"]["val_loss"] < 6.5 and 0 < summary["dense"]["val_loss"] < 6.5
    assert summary["unigram_entropy"] > 0 and summary["seconds"] > 0
    assert summary["double_prune_extra_zeros"]["formula"] == 0.09375
    report = (out / "report.md").read_text()
    assert f"{summary['sparse']['val_loss']:.4f}" in report and "(report.png)" in report
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "adapters: rank 16, from step 7 on" in report
    assert len(summary["corpus"]["sha256"]) == 64 and summary["corpus"]["sha256"] in report

    again = quickstart("--source", texts, "--out", out, "--steps", 8, *SMALL)
    assert again.returncode == 2 and "give --resume, --overwrite or another --out" in again.stderr
    # What is finished is not done again.
    resumed = quickstart("--source", texts, "--out", out, "--steps", 8, *SMALL, "--resume")
    assert resumed.returncode == 0
    assert json.loads((out / "summary.json").read_text())["sparse"] == summary["sparse"]


BAD = [
    (["--hidden", 72], "--hidden-size is 72: --tensor-parallel 2 must divide it"),
    (["--ranks", 3], "3 ranks were started with --tensor-parallel 2"),
    (["--source", "nowhere"], "nowhere"),
    (["--steps", 0], "--steps is 0: it must be at least 1"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, flags, message):
    out = tmp_path / "out"
    result = quickstart("--out", out, *flags)
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1 and message in said[0]
    assert not out.exists()


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    result = quickstart("--source", tmp_path / "empty", "--out", tmp_path / "out")
    assert result.returncode == 2 and "slope: error: " in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_mixed_folder_is_read_as_it_is_told(tmp_path):
    """`--format` reaches the reader: what is refused then is the vocabulary of the little text that is left."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "README.md").write_text("words about it")
    (folder / "a.jsonl").write_text("".join(f'{{"text": "record {number}"}}\n' for number in range(20)))
    for flags, message in (([], "holds files of several formats"), (["--format", "json"], "--vocab-size is 2048")):
        result = quickstart("--source", folder, "--out", tmp_path / "out", *flags)
        assert result.returncode == 2 and message in result.stderr
        assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    result = quickstart("--out", tmp_path, "--overwrite")
    assert result.returncode == 2 and "is not empty and holds no quickstart" in result.stderr
    assert (tmp_path / "thesis.tex").read_text() == "do not lose me"


@pytest.mark.slow
def test_an_interrupted_quickstart_leaves_no_rank_behind_and_goes_on(texts, tmp_path):
    """An interruption that reaches the command alone ends its launcher and ranks as well."""
    out = tmp_path / "out"
    flags = ["--source", texts, "--out", out, "--steps", 20, "--no-dense-twin", "--ranks", 2, *SMALL]
    command = [sys.executable, "-m", "slope_megatron", "quickstart", *map(str, flags)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        waited = time.monotonic()
        while len(ranks_of(out)) < 4 and time.monotonic() - waited < 300:  # the launcher's two processes and two
            time.sleep(0.2)
        assert len(ranks_of(out)) == 4
        process.terminate()  # as Ctrl-C, which a shell lets its background ignore
        said = process.stderr.read()
        assert process.wait(timeout=300) == 130
    assert said.splitlines()[-1] == "slope: interrupted: the same command with --resume goes on"
    assert not ranks_of(out)
    assert quickstart(*flags, "--resume").returncode == 0
    assert (out / "report.md").is_file()


def ranks_of(out: Path) -> list[str]:
    """Processes that train into a folder below `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "pretrain" in words and f"{out}/sparse" in words:
            found.append(path.parent.name)
    return found


@pytest.fixture
def played(monkeypatch):
    """A quickstart whose runs end at once; the list of those that were launched."""
    from slope_megatron.cli import quickstart

    launched = []

    def launch(flags, ranks, run_folder):
        launched.append((run_folder.name, flags[flags.index("--dtype") + 1]))
        run_folder.mkdir(exist_ok=True)
        (run_folder / "summary.json").write_text("{}")
        if len(launched) == 1:
            raise ValueError("told to stop, and saved: exit code 75")
        (run_folder / "DONE").write_text("")

    def write_results(out, configs, summaries, manifest, seconds, dtype_reason):
        (out / "report.md").write_text(json.dumps(seconds))

    monkeypatch.setattr(quickstart, "launch", launch)
    monkeypatch.setattr(quickstart, "choose_dtype", lambda arguments: (f"bf16-{len(launched)}", "measured"))
    monkeypatch.setattr(quickstart, "write_results", write_results)
    return launched


def test_a_resumed_quickstart_keeps_what_it_knew_and_a_finished_one_is_left_alone(played, texts, tmp_path, capsys):
    from slope_megatron.cli import main

    (tmp_path / "large").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "large")
    flags = ["quickstart", "--source", str(texts), "--out", str(out), "--steps", "20", *SMALL]
    assert main(flags) == 2 and "exit code 75" in capsys.readouterr().err
    began = json.loads((out / "progress.json").read_text())
    assert main([*flags, "--resume"]) == 0
    # The run that was stopped has a summary, too, and goes on, with the type that it began with.
    assert played == [("sparse", "bf16-0"), ("sparse", "bf16-0"), ("dense", "bf16-0")]
    seconds = json.loads((out / "report.md").read_text())
    assert seconds["data"] > began["seconds"]["data"] > 0
    assert seconds["total"] == pytest.approx(seconds["data"] + seconds["sparse"] + seconds["dense"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "large").rglob("*")}
    assert main([*flags, "--resume"]) == 0
    assert f"{out} is finished: nothing was changed. Its report: {out}/report.md" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "large").rglob("*")}
    (out / "quickstart.json").write_bytes(b"\xff")
    assert main([*flags, "--resume"]) == 2
    assert "quickstart.json is damaged: it is no JSON" in capsys.readouterr().err
    assert main([*flags, "--overwrite"]) == 0
    assert out.is_symlink() and played[3:] == [("sparse", "bf16-3"), ("dense", "bf16-3")]


def test_a_corpus_that_is_gone_costs_no_trained_run(played, texts, tmp_path, capsys):
    """The data is moved away after the sparse run, and the texts with it."""
    from slope_megatron.cli import main

    source = shutil.copytree(texts, tmp_path / "texts")
    out = tmp_path / "out"
    flags = ["quickstart", "--source", str(source), "--out", str(out), "--steps", "20", *SMALL]
    assert main(flags) == 2 and "exit code 75" in capsys.readouterr().err
    shutil.move(out / "data", tmp_path / "moved")
    shutil.rmtree(source)
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    assert main([*flags, "--resume"]) == 2
    assert "slope: error:" in capsys.readouterr().err
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before
    assert (out / "sparse" / "summary.json").is_file()


def test_a_quickstart_that_is_preparing_is_not_removed_by_a_second_one(texts, tmp_path, monkeypatch, capsys):
    from slope_megatron.cli import main
    from slope_megatron.data import prepare, scratch

    out = tmp_path / "out"
    original = prepare.prepare
    with contextlib.ExitStack() as other:

        def second(source, folder, **settings):
            other.enter_context(scratch.workspace_beside(folder, {}))
            return original(source, folder, **settings)

        monkeypatch.setattr(prepare, "prepare", second)
        assert main(["quickstart", "--source", str(texts), "--out", str(out), "--steps", "20", *SMALL]) == 2
        assert "another process is preparing" in capsys.readouterr().err
        assert (out / "quickstart.json").is_file() and list(out.glob(".data.*/identity.json"))
