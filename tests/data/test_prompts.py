"""Prompts are the lines of a file as an editor counts them, or what its records hold."""

import gzip
import io
import json
import types

import pytest

from slope_megatron.data.prompts import read_prompts_of

PROMPTS = ["import os\x0cdef f():", "A\u2028B\x85C\x1c", "  last"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_end_at_line_feeds_alone(tmp_path, caplog, encoding, end):
    text = end.join([*PROMPTS[:2], "", " ", PROMPTS[2]])
    (tmp_path / "prompts.txt").write_bytes(text.encode(encoding))
    assert read_prompts_of(str(tmp_path / "prompts.txt")) == PROMPTS
    assert "3 prompts; passed over: 2 empty" in caplog.text


def test_standard_input_is_read_as_a_file_is(monkeypatch):
    content = io.BytesIO("\r\n".join(PROMPTS).encode())
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=content))
    assert read_prompts_of("-") == PROMPTS


def test_records_give_their_prompts(tmp_path):
    lines = "".join(json.dumps({"prompt": prompt, "text": "answer"}) + "\n" for prompt in PROMPTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.JSON.gz").write_bytes(gzip.compress(json.dumps([{"prompt": p} for p in PROMPTS]).encode()))
    for name in ("a.jsonl", "b.JSON.gz"):
        assert read_prompts_of(str(tmp_path / name)) == PROMPTS


def test_bad_files_are_one_sentence(tmp_path):
    for name, content, message in (
        ("a.jsonl", b'{"text": "x"}\n', r"a.jsonl:1 has no text under 'prompt': every record must be like"),
        ("b.jsonl", b"def f():\n", "b.jsonl:1 is no JSON: every record"),
        ("c.txt", b"caf\xe9\n", r"c.txt is not UTF-8 \(byte 3\): save it as UTF-8 text"),
        ("d.txt", b"\n \n", "d.txt holds no prompt: put one in each line"),
        ("e.txt.gz", gzip.compress(b"prompt\n" * 90)[:-9], "e.txt.gz is damaged or cut .*: fetch it again"),
        ("f.csv", b"a,b\n", "f.csv is of no format that is read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts_of(str(tmp_path / name))
