"""Files of GLUE's and SQuAD's form are read as the project reads every text."""

import gzip
import json

import pytest

from slope_megatron.evaluation import glue, squad


def test_tasks_are_read_from_any_form_of_records(tmp_path):
    """Packed, an array, with a byte order mark; a sentence may hold what `str.splitlines` takes for a line end."""
    rows = [{"sentence": f"a\u2028b\x85{number}", "label": number % 2} for number in range(5)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    forms = {
        "train.jsonl": lines.encode("utf-8-sig"),
        "train.JSONL.gz": gzip.compress(lines.encode()),
        "train.json": json.dumps(rows).encode(),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        assert glue.read_split("cola", "train", tmp_path) == rows
        (tmp_path / name).unlink()
    for name in forms:
        (tmp_path / name).write_bytes(forms[name])
    with pytest.raises(ValueError, match=r"has train.JSONL.gz and train.json: leave one of them there"):
        glue.read_split("cola", "train", tmp_path)
    questions = {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}]}]}
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(json.dumps(questions).encode("utf-8-sig")))
    assert squad.read_questions(tmp_path / "dev.json.gz") == [
        {"context": "c", "id": "1", "question": "q", "answers": []}
    ]
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"has not the form of SQuAD v1.1 \(RecursionError"):
        squad.read_questions(tmp_path / "deep.json")
