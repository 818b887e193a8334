"""Configuration files as people write them, and what is said of those that cannot be read."""

import argparse
import os
import re

import pytest

from slope_megatron.config import add_config_arguments, read_config
from slope_megatron.config.json_file import read_json
from slope_megatron.config.yaml_file import read_yaml, write_yaml

# The core schema of YAML 1.2 (section 10.3.2), and beside it what YAML 1.1 made of the same text.
SCALARS = {
    "6e-4": 6e-4,
    "1e-05": 1e-5,
    "-1.5E+3": -1500.0,
    "1e3": 1000.0,
    ".5": 0.5,
    "3.": 3.0,
    "12": 12,
    "-7": -7,
    "+5": 5,
    "-0": 0,
    "0100": 100,  # 64
    "012": 12,  # 10
    "08": 8,
    "0o17": 15,
    "0x1F": 31,
    ".inf": float("inf"),
    "-.INF": -float("inf"),
    "true": True,
    "FALSE": False,
    "": None,
    "~": None,
    "Null": None,
    "2:4": "2:4",  # 124, to base 60
    "1:30:00": "1:30:00",
    "1_000": "1_000",  # 1000
    "0b11": "0b11",  # 3
    "2024-01-01": "2024-01-01",  # a date
    "yes": "yes",  # true, as the next five
    "no": "no",
    "on": "on",
    "Off": "Off",
    "y": "y",
    "N": "N",
    "=": "=",
    "1.56%": "1.56%",
    "0-3": "0-3",
    "0o8": "0o8",
    "1e": "1e",
    "!!str 12": "12",
    "'0100'": "0100",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_are_those_of_the_core_schema(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"key: {text}\n")
    found = read_yaml(path)["key"]
    assert found == value and type(found) is type(value)


def test_an_empty_file_anchors_and_byte_order_marks(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
    path.write_text("a: &a {x: 1, y: 2}\nb: *a\n")
    assert read_yaml(path)["b"] == {"x": 1, "y": 2}
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        path.write_text("%YAML 1.2\n---\na: ξ\r\nb: 010\r\n", encoding=encoding)
        assert read_yaml(path) == {"a": "ξ", "b": 10}


BAD = {
    "brackets": (b"train: [1\n  a: {", r":2:4: no valid YAML \(expected ',' or '\]', but got ':'\): mend that line"),
    "latin": (b"a: \xff\n", r"is not UTF-8 \(byte 3\): save it as UTF-8 text"),
    "twice": (b"a: 1\nb: 2\na: 3\n", r":3:1: no valid YAML \(found duplicate key\): mend that line"),
    "twice in a flow": (b"a: {x: 1, x: 2}", r":1:11: no valid YAML \(found duplicate key\)"),
    "bell": (b"a: \x07\n", "is no valid YAML .*: mend it"),
    "documents": (b"a: 1\n---\nb: 2\n", r":2:1: no valid YAML \(a second document begins here\)"),
    "object": (b"a: !!python/object/apply:os.getcwd []", r":1:4: no valid YAML \(could not determine a constructor"),
    "own tag": (b"a: !mine 3", r":1:4: no valid YAML \(could not determine a constructor for the tag '!mine'\)"),
    "no integer": (b"a: !!int one", "has a value that is not what its tag says .*: mend it"),
    "no truth": (b"a: !!bool yes", "has a value that is not what its tag says .*: mend it"),
    "deep": (b"[" * 5000, "is nested too deeply: mend it"),
    "line end": (
        b"# was\xe2\x80\xa8steps: 3\na: 1",
        r":1: U\+2028 ends a line in old YAML and not in new",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_one_sentence_with_its_name(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}") as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_numbers_of_a_run_are_what_the_file_says(tmp_path):
    """From the file to the typed fields: `0100` steps are 100, and what is text is no number."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    path = tmp_path / "run.yaml"

    def config_of(text):
        path.write_text(text)
        return read_config(parser.parse_args(["--config", str(path)]))[0]

    config = config_of("slope: {nm: 2:4}\ntrain: {steps: 0100}\noptimizer: {lr: 6e-4, warmup_steps: 0o17}\n")
    assert (config.train.steps, config.slope.nm, config.optimizer.lr) == (100, "2:4", 6e-4)
    assert config.optimizer.warmup_steps == 15
    for text, message in (
        ("train: {steps: 1_000}", "--steps is '1_000': it must be of type int"),
        ("train: {resume: no}", "--resume is 'no': it must be of type bool"),
        ("- train", "holds list: it must map sections to keys and values"),
        ("a: &a {steps: 3}\ntrain:\n  <<: *a\n", "unknown section 'a'"),
        ("train: &a {steps: 3}\ndata:\n  <<: *a\n", "unknown key data.<<"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(text)


TEXTS = ("6e-4", "0o17", "0100", "2:4", "yes", "true", "null", "", "1_000", "0x10", ".5", "~", "a: b", "# x")
TEXTS += ("ξ\u2028",)


def test_what_is_written_is_read_back(tmp_path):
    content = {"texts": dict(enumerate(TEXTS)), "numbers": [1e-5, 6e-4, 1e16, float("inf"), 3, True, None]}
    write_yaml(tmp_path / "a.yaml", content)
    assert read_yaml(tmp_path / "a.yaml") == content


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
    for content in (b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged: it is no JSON .*; copy it again"):
            read_json(path, "copy it again")


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text('{"a": "ξ"}', encoding=encoding)
        assert read_json(path, "copy it again") == {"a": "ξ"}
