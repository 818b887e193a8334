"""`slope doctor` and the command line's manners."""

import json

import pytest

from slope_megatron.cli import build_parser, main


def test_doctor_names_versions_and_a_backend_for_each_operation(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] and found["versions"]["megatron-core"]
    assert found["backends"]["reference"] == "available"
    assert set(found["operations"]) == {"sparse forward", "sparse dgrad", "wgrad"}
    assert all(backend in found["backends"] for backend in found["operations"].values())
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "backends of the sparse products" in printed and "sparse dgrad" in printed


@pytest.mark.parametrize("command", ["quickstart", "data", "pretrain", "doctor"])
def test_every_command_has_a_manual(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_unknown_flags_and_abbreviations_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(["pretrain", "--slope-adapter", "4"])
    assert end.value.code == 2
    assert "unrecognized arguments: --slope-adapter" in capsys.readouterr().err
