"""Manual pages, wrong usage, what the file system refuses, and log lines beside progress bars."""

import argparse
import errno
import io
import logging

import pytest

from slope_megatron import cli
from slope_megatron.cli.bench import BENCHMARKS
from slope_megatron.cli.pretrain import MEGATRON_FLAGS


def pages(parser: argparse.ArgumentParser):
    """A command's parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from pages(child)


# A benchmark makes its page when it is asked for: see below.
PAGES = {parser.prog: parser for parser in pages(cli.build_parser()) if parser.add_help}


@pytest.mark.parametrize("prog", PAGES)
def test_each_command_has_a_manual_page(prog):
    """Usage, purpose, examples, exit codes, in lines that a terminal shows."""
    page = PAGES[prog].format_help()
    assert page.startswith(f"usage: {prog}") and PAGES[prog].description
    assert "exit codes" in page.lower() and "  2  bad input" in page
    if prog != "slope data":  # its one action has them
        assert "example" in page.lower()
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_has_one_too(capsys, name):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", name, "--help"])
    page = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: slope bench {name}" in page
    assert "examples:" in page and "exit codes:" in page


WRONG = {
    "pretrain --stpes 5": "slope pretrain: error: unrecognized arguments: --stpes 5 (did you mean --steps?); see",
    "pretrain --hiden-size=5": "unrecognized arguments: --hiden-size=5 (did you mean --hidden-size?)",
    "plan --nodez 2": "slope plan: error: unrecognized arguments: --nodez 2 (did you mean --nodes?); see slope plan --",
    "data prepare a --out b --vocabsize 5": "(did you mean --vocab-size?); see slope data prepare --help",
    "generate a --prompt b --zzz": "unrecognized arguments: --zzz; see slope generate --help",
    "report a extra --unknown": "slope report: error: unrecognized arguments: --unknown; see",
    "bench gemm --tokenz 5": "slope bench gemm: error: unrecognized arguments: --tokenz 5 (did you mean --tokens?)",
    "pretrain --steps many": "slope pretrain: error: argument --steps: invalid int value: 'many'; see slope",
    "pretrian": "slope: error: argument COMMAND: invalid choice: 'pretrian' (choose from",
    "plan --cluster": "slope plan: error: argument --cluster: expected one argument",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items())
def test_wrong_usage_is_one_sentence(capsys, line, message):
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and message in said[0]


def test_what_the_file_system_refuses_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    command = ["report", str(run), "--out", str(tmp_path / "file" / "x")]
    assert cli.main(command) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"slope: error: --out {tmp_path}/file/x: {tmp_path}/file is a file; give the path of a folder"
    ]
    with pytest.raises(ValueError, match="is a file; give the path of a folder"):
        cli.main(["--verbose", *command])
    refused = cli.refusal(NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"))
    assert refused == "a/b: Not a directory; a part of that path is a file: give another one"


def test_an_error_that_is_no_paths_keeps_its_traceback():
    assert cli.refusal(OSError(errno.ECONNRESET, "reset", "somewhere")) is None
    assert cli.refusal(PermissionError(errno.EACCES, "no")) is None
    full = cli.refusal(OSError(errno.ENOSPC, "full", b"a/b"))
    assert full == "a/b: No space left on device; free some space, or give a path on another disk"


def test_a_log_line_stands_above_the_bar():
    from tqdm import tqdm

    stream = io.StringIO()
    logger = logging.Logger("test")
    logger.addHandler(cli.AboveBars(stream))
    with tqdm(total=3, file=stream, desc="run"):
        logger.warning("a line")
    assert "a line" in [line.split("\r")[-1] for line in stream.getvalue().split("\n")]


@pytest.mark.parametrize("flag", sorted(MEGATRON_FLAGS))
def test_flags_of_megatron_are_answered_with_ours(flag, capsys):
    meant = MEGATRON_FLAGS[flag]
    with pytest.raises(SystemExit) as ended:
        cli.parse(["pretrain", flag, "5"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"unrecognized arguments: {flag} 5 (did you mean {meant}?)" in said
    assert said.count("\n") == 1
    known = PAGES["slope pretrain"]._option_string_actions
    assert meant.split()[0] in known
    assert flag not in known


def test_a_blank_prompt_is_refused(capsys):
    assert cli.main(["generate", "nowhere", "--prompt", "  "]) == 2
    assert "--prompt is empty or blank: the model needs a text to go on from" in capsys.readouterr().err
