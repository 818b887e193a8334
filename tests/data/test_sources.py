"""Documents come in one order, whole, and nothing is passed over uncounted."""

import json
import sys
import sysconfig
import types
from collections import Counter

import pytest

from slope_megatron.data import sources
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.sources import open_source


def read(spec, **options):
    source = open_source(str(spec), PrepareSettings(**options))
    return list(source.documents()), source


def write_jsonl(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_stdlib_is_this_pythons_own():
    documents, source = read("stdlib")
    names = [name for name, _ in documents]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    assert sum(len(text) for _, text in documents) > 5_000_000
    assert source.split_by == "name"


def test_stdlib_passes_over_large_and_foreign_files(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x")
    (tmp_path / "small.py").write_text("x = 1\n")
    (tmp_path / "large.py").write_text("x" * 2_000_001)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "notes.txt").write_text("no module")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(sources, "MAX_STDLIB_FILE", 2_000_000)
    documents, source = read("stdlib")
    assert documents == [("small.py", "x = 1\n")]
    passed = {"over 2 MB": 1, "not UTF-8": 1, "no .py file": 1, "left-out folder": 1}
    assert source.skipped == Counter(passed)


def test_folder_gives_every_text_file_sorted(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.md").write_bytes(b"one\r\ntwo\r")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image").write_bytes(b"\x00\x01")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("not read")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    documents, source = read(tmp_path)
    assert documents == [("b.txt", "three"), ("b/a.md", "one\r\ntwo\r")]
    assert source.skipped == Counter({"empty": 1, "binary": 1, "not UTF-8": 1, "broken link": 1, "hidden": 1})
    assert read(tmp_path)[0] == documents


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("a\n\nb\n")
    assert read(tmp_path / "book.txt")[0] == [("book.txt", "a\n\nb\n")]


def test_jsonl_gives_a_document_a_line(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"text": "a\nb", "body": "x"}, "\n", {"text": "ξ", "body": "y"})
    assert read(path)[0] == [("c.jsonl:1", "a\nb"), ("c.jsonl:3", "ξ")]
    assert [text for _, text in read(path, text_key="body")[0]] == ["x", "y"]
    assert read(path)[1].split_by == "text"


def test_folder_of_nothing_but_jsonl_is_read_as_records(tmp_path):
    for shard in "ba":
        write_jsonl(tmp_path / f"{shard}.jsonl", {"text": shard + "1"}, {"text": shard + "2"})
    documents, source = read(tmp_path)
    assert [text for _, text in documents] == ["a1", "a2", "b1", "b2"]
    assert source.split_by == "text"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": \n', r"c.jsonl:2 is no JSON: every line must be like \{\"text\""),
        ("[1]\n", "c.jsonl:2 is a JSON list, no object"),
        ({"body": "x", "id": 1}, r"c.jsonl:2 has no key 'text' \(it has body, id\).*--text-key"),
        ({"text": 3}, "c.jsonl:2 has 3 under 'text', no string"),
        ('{"text": "\\ud800"}\n', "c.jsonl:2 holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_jsonl(tmp_path / "c.jsonl", {"text": "good"}, line)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"c.jsonl:1 is no JSON"):
        read(tmp_path / "c.jsonl")


@pytest.mark.parametrize("spec", ["nowhere", "nowhere.jsonl"])
def test_missing_source_is_refused(tmp_path, spec):
    with pytest.raises(ValueError, match=f"source .*{spec} does not exist: give stdlib, a folder"):
        open_source(str(tmp_path / spec), PrepareSettings())


def test_empty_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no text: give one of"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no text \(passed over: 1 empty\): give one of"):
        read(tmp_path)
    with pytest.raises(ValueError, match="names no dataset: write hf:NAME"):
        open_source("hf:", PrepareSettings())


def test_datasets_reads_local_folders(tmp_path):
    import datasets

    texts = [f"text {number}" for number in range(5)]
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", *({"text": text} for text in texts))
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    for folder in ("files", "saved"):
        documents, source = read(f"hf:{tmp_path / folder}")
        assert [text for _, text in documents] == texts
        assert source.split_by == "text"
    with pytest.raises(ValueError, match=r"row 0 of dataset .* has no text in column 'body': .* text \(str\); name"):
        read(f"hf:{tmp_path / 'files'}", text_key="body")


def test_an_unreachable_hub_is_one_sentence(monkeypatch, caplog):
    caplog.set_level("INFO")

    def broken_stream(*_, **__):
        yield {"text": "first"}
        raise OSError("connection reset\nby peer")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\ntraceback")

    for load, reason in ((unreachable, "Couldn't reach 'a/b' on the Hub"), (broken_stream, "connection reset")):
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
        with pytest.raises(ValueError) as refusal:
            read("hf:a/b:en")
        assert str(refusal.value).startswith(f"dataset a/b cannot be read ({reason}): check the name")
        assert "\n" not in str(refusal.value)
    assert "asking for dataset a/b" in caplog.text


def test_name_and_configuration_reach_the_library(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    assert read("hf:org/name:en")[0] == [("org/name:0", "a")]
    read("hf:name")
    options = {"split": "train", "streaming": True}
    assert asked == [(("org/name", "en"), options), (("name", None), options)]


def test_without_the_library_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="source hf:a needs the `datasets` library: pip install datasets"):
        read("hf:a")
