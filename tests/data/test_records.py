"""Records come from JSON lines and Parquet alike; bad ones are refused, or counted and shown."""

import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from slope_megatron.data.prepare import prepare
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.sources import open_source, parse_specs

TEXTS = [f"record {number}, ξ\n" * 5 for number in range(30)]


def texts_of(spec, **options):
    source = open_source(str(spec), PrepareSettings(**options))
    return [text for _, text in source.documents()], source


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_all_forms_hold_the_same_records(tmp_path):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    for name in ("b.jsonl.gz", "c.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    for path in sorted(tmp_path.iterdir()):
        texts, source = texts_of(path, text_key="body")
        assert texts == TEXTS
        assert source.split_by == "text"
    assert texts_of(tmp_path, text_key="body")[0] == TEXTS * 3
    rows = write_parquet(tmp_path / "d.parquet", id=list(range(30)), body=TEXTS)
    assert texts_of(rows, text_key="body")[0] == TEXTS


BAD_LINES = [
    b'{"text": \n',
    b"[1]\n",
    b'{"body": "x"}\n',
    b'{"text": 3}\n',
    b'{"text": "\\ud800"}\n',
    b'{"text": "\xe9"}\n',
    b"[" * 100_000 + b"\n",
]


def test_bad_lines_are_counted_and_shown_or_refused(tmp_path, caplog):
    good = b'{"text": "good"}\n'
    (tmp_path / "c.jsonl").write_bytes(good + b"".join(BAD_LINES) + good)
    with caplog.at_level(logging.WARNING, "slope_megatron"):
        texts, source = texts_of(tmp_path / "c.jsonl", bad_records="skip")
    assert texts == ["good", "good"]
    expected = {"no JSON": 2, "no object": 1, "no text key": 1, "no string": 1, "half a surrogate pair": 1}
    assert source.skipped == {**expected, "not UTF-8": 1}
    assert [record.message.split(": ")[1].split(" ")[0] for record in caplog.records] == [
        f"{tmp_path}/c.jsonl:{number}" for number in (2, 3, 4)
    ]
    for number, line in enumerate(BAD_LINES):
        (tmp_path / f"{number}.jsonl").write_bytes(good + line)
        with pytest.raises(ValueError, match=rf"{number}.jsonl:2 .*; to pass such records over: --bad-records skip"):
            texts_of(tmp_path / f"{number}.jsonl")


def test_bad_rows_and_files_are_named(tmp_path):
    write_parquet(tmp_path / "c.parquet", text=["good", None, "too"])
    with pytest.raises(ValueError, match=r"c.parquet:1 has None under 'text', no string"):
        texts_of(tmp_path / "c.parquet")
    texts, source = texts_of(tmp_path / "c.parquet", bad_records="skip")
    assert texts == ["good", "too"] and source.skipped == {"no string": 1}
    with pytest.raises(ValueError, match=r"has no column 'body' \(it has text\): name the text column"):
        texts_of(tmp_path / "c.parquet", text_key="body")
    whole = write_parquet(tmp_path / "whole.parquet", text=TEXTS).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut.parquet is damaged or cut"):
        texts_of(tmp_path / "cut.parquet")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz is damaged or cut"):
        texts_of(tmp_path / "cut.jsonl.gz")


def test_long_and_equal_documents_are_passed_over(tmp_path):
    texts = [*TEXTS, "é" * 1000, *TEXTS[:4], ""]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"vocab_size": 300, "max_document_bytes": 1999, "deduplicate": True, "workers": 1}
    manifest = prepare(str(tmp_path / "c.jsonl"), tmp_path / "data", **settings)
    (source,) = manifest["sources"]
    assert source["corpus"]["skipped"] == {"duplicate": 4, "empty": 1, "over the byte limit": 1}
    assert manifest["corpus"]["documents"] == len(TEXTS)
    # Across sources: the second one holds nothing new.
    with pytest.raises(ValueError, match="holds no text that an earlier source does not hold"):
        prepare([str(tmp_path / "c.jsonl")] * 2, tmp_path / "two", **settings)


def test_weights_of_sources(tmp_path):
    assert parse_specs(["a=0.7", "hf:b/c:en=3e-1"]) == (["a", "hf:b/c:en"], [0.7, 0.3])
    assert parse_specs(["a", "b=c"]) == (["a", "b=c"], None)
    file = tmp_path / "a=2"
    file.write_text("text")
    assert parse_specs([str(file)]) == ([str(file)], None)
    for specs, message in (
        (["a=0.7", "b"], "1 of the 2 sources have a weight: give each one"),
        (["a=0"], "has weight 0.0: it must be positive"),
        (["a=--"], "has no number behind the ="),
    ):
        with pytest.raises(ValueError, match=message):
            parse_specs(specs)


def test_a_stream_goes_on_at_its_row(monkeypatch):
    """The hub's rows that an earlier reading had are not fetched again."""
    import sys
    import types

    fetched = []

    class Rows(list):
        def skip(self, count):
            return Rows(self[count:])

        def __iter__(self):
            for row in super().__iter__():
                fetched.append(row)
                yield row

    rows = Rows({"text": text} for text in ["a", "", "b", None, "c", "d"])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    source = open_source("hf:x", PrepareSettings(bad_records="skip"))
    assert [text for _, text in source.documents()] == ["a", "b", "c", "d"]
    assert source.skipped == {"empty": 1, "no string": 1}
    fetched.clear()
    assert list(source.documents(2, {"empty": 1})) == [("x:4", "c"), ("x:5", "d")]
    assert len(fetched) == 3 and source.skipped == {"empty": 1, "no string": 1}


def test_cells_that_are_no_utf8_are_counted(tmp_path):
    raw = pyarrow.array([b"good", b"caf\xe9", b"too"])
    text = pyarrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    path = write_parquet(tmp_path / "c.parquet", text=text)
    texts, source = texts_of(path, bad_records="skip")
    assert texts == ["good", "too"] and source.skipped == {"not UTF-8": 1}
    with pytest.raises(ValueError, match=r"c.parquet:1 is not UTF-8: mend the file; to pass such records over"):
        texts_of(path)
