"""`slope data prepare` from its flags to the folder."""

import argparse
import subprocess
import sys

import pytest
from conftest import VOCABULARY

from slope_megatron.cli import data
from slope_megatron.data.manifest import load_manifest


def parse(*flags):
    parser = argparse.ArgumentParser(prog="slope")
    data.add_parser(parser.add_subparsers())
    return parser.parse_args(["data", *flags])


def test_prepare(corpus_folder, tmp_path, capsys):
    out = tmp_path / "data"
    flags = ["--vocab-size", str(VOCABULARY), "--valid-percent", "10", "--workers", "1"]
    arguments = parse("prepare", str(corpus_folder), "--out", str(out), *flags)
    assert arguments.run(arguments) == 0
    manifest = load_manifest(out)
    printed = capsys.readouterr().out
    for split, figures in manifest["splits"].items():
        line = next(line for line in printed.splitlines() if line.startswith(split))
        assert line.split()[-2:] == [f"{figures['tokens']:,}", f"{figures['unigram_entropy']:.4f}"]
    assert manifest["settings"]["valid_percent"] == 10


def test_bad_input_is_a_value_error(tmp_path):
    arguments = parse("prepare", str(tmp_path / "none"), "--out", str(tmp_path / "data"))
    with pytest.raises(ValueError, match="does not exist"):
        arguments.run(arguments)


def test_help_is_a_manual_page(capsys):
    with pytest.raises(SystemExit) as end:
        parse("prepare", "--help")
    assert end.value.code == 0
    page = capsys.readouterr().out
    for word in ("hf:NAME[:CONFIG]", "manifest.json", "--overwrite", "examples:", "slope data prepare stdlib --out"):
        assert word in page


def test_parsing_and_importing_are_light():
    code = (
        "import sys, slope_megatron.cli.data, slope_megatron.data.prepare;"
        "assert not {'torch', 'megatron', 'datasets', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
