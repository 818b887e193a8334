"""Documents counted in are documents counted out and those passed over; a split that was asked for holds text."""

import json

import pytest

from slope_megatron.data import corpus as corpus_module
from slope_megatron.data.figures import check_counts
from slope_megatron.data.prepare import prepare
from slope_megatron.data.records import Tally
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.storage import sums


def write_records(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("part", [100, 10**6])
def test_bert_documents_without_a_sentence_are_counted(tmp_path, monkeypatch, part):
    monkeypatch.setattr(corpus_module, "PART", part)
    texts = [f"Sentence {number}. Another one." for number in range(30)] + [" ", "\n\t", ""]
    source = write_records(tmp_path / "c.jsonl", texts)
    settings = {"kind": "bert", "vocab_size": 100, "valid_percent": 20, "test_percent": 0, "workers": 1}
    manifest = prepare(source, tmp_path / "data", **settings)
    assert manifest["sources"][0]["corpus"]["skipped"] == {"empty": 1, "without a sentence": 2}
    assert manifest["corpus"]["documents"] == 32
    assert sum(split["documents"] for split in manifest["splits"].values()) == 30


def test_a_split_that_comes_out_empty_is_refused(tmp_path):
    """All that would validate has no sentence."""
    from slope_megatron.data.splits import split_key

    blank = min((" " * count for count in range(1, 300)), key=split_key)
    texts = [text for n in range(60) if split_key(text := f"Sentence {n}. Another one.") > 2 * split_key(blank)]
    source = write_records(tmp_path / "c.jsonl", [*texts, blank])
    settings = {"kind": "bert", "vocab_size": 100, "valid_percent": 150 * split_key(blank), "test_percent": 0}
    with pytest.raises(ValueError, match=r"the valid split has no tokens \(1 documents without a sentence\): give"):
        prepare(source, tmp_path / "data", workers=1, **settings)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("valid", "test"), [(0, 0), (0, 2), (99.9, 0), (1e-9, 1e-9)])
def test_shares_at_their_limits_leave_no_asked_split_empty(tmp_path, valid, test):
    source = write_records(tmp_path / "c.jsonl", [f"record {number}" for number in range(12)])
    settings = {"tokenizer": "bpe", "vocab_size": 260, "valid_percent": valid, "test_percent": test}
    manifest = prepare(source, tmp_path / "data", workers=1, **settings)
    sizes = {name: split["documents"] for name, split in manifest["splits"].items()}
    assert sum(sizes.values()) == 12
    assert {name: bool(size) for name, size in sizes.items()} == {"train": True, "valid": valid > 0, "test": test > 0}


def test_a_document_that_vanishes_is_a_fault():
    """The checks themselves can fail."""
    tally = Tally()
    tally.met = 3
    tally.skipped["empty"] += 1
    tally.check(documents=2)
    with pytest.raises(AssertionError, match="3 read, 1 documents and 1 passed over"):
        tally.check(documents=1)
    splits = {name: {"documents": 2, "dropped": 1, "tokens": 9} for name in ("train", "valid", "test")}

    class Corpus:
        keys_D = range(10)

    with pytest.raises(AssertionError, match="10 documents read, 9 written or dropped"):
        check_counts([Corpus()], [splits], PrepareSettings())


def test_a_folder_of_an_earlier_version_is_still_known(tmp_path):
    """Its manifest lacks its own sum and the settings that did not exist then: they count as their defaults."""
    source = write_records(tmp_path / "c.jsonl", [f"record {number}" for number in range(12)])
    prepare(source, tmp_path / "data", vocab_size=280, workers=1)
    place = tmp_path / "data" / "manifest.json"
    manifest = json.loads(place.read_text())
    del manifest[sums.ALGORITHM]
    for key in ("format", "include"):
        del manifest["settings"][key]
    place.write_text(json.dumps(manifest))
    assert prepare(source, tmp_path / "data", vocab_size=280, workers=1) == manifest
    with pytest.raises(ValueError, match=r"other settings .*format auto then, json now"):
        prepare(source, tmp_path / "data", vocab_size=280, workers=1, format="json")
