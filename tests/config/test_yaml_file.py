"""Configuration files as people write them, and what is said of those that cannot be read."""

import os
import re

import pytest

from slope_megatron.config.json_file import read_json
from slope_megatron.config.yaml_file import read_yaml

NUMBERS = {
    "6e-4": 6e-4,
    "1e-05": 1e-5,
    "-1.5E+3": -1500.0,
    ".5": 0.5,
    "3.": 3.0,
    "12": 12,
    "-7": -7,
    ".inf": float("inf"),
    # To base 60 in YAML 1.1.
    "2:4": "2:4",
    "1.56%": "1.56%",
    "0-3": "0-3",
    "true": True,
    "": None,
}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_scalars_are_what_they_look_like(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"key: {text}\n")
    found = read_yaml(path)["key"]
    assert found == value and type(found) is type(value)


def test_an_empty_file_and_merged_mappings(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
    path.write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


BAD = {
    b"train: [1\n  a: {": r":2:4: no valid YAML \(expected ',' or '\]', but got ':'\): mend that line",
    b"a: \xff\n": r"is not UTF-8 \(byte 3\): save it as UTF-8 text",
    b"a: 1\nb: 2\na: 3\n": r":3:1: no valid YAML \(key 'a' is given twice\)",
    b"a: \x07\n": "is no valid YAML .*: mend it",
}


@pytest.mark.parametrize(("content", "message"), BAD.items(), ids=["brackets", "latin", "twice", "bell"])
def test_a_bad_file_is_one_sentence_with_its_name(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}") as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder: give a YAML file"):
        read_yaml(tmp_path)
    with pytest.raises(ValueError, match="does not exist: give a YAML file"):
        read_yaml(tmp_path / "no.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\): make it readable"):
        read_yaml(path)


def test_damaged_json_names_the_file_and_the_way_out(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"{", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged: it is no JSON .*; copy it again"):
            read_json(path, "copy it again")
