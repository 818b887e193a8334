"""A prepared folder is what its manifest says, the same every time, and never half there."""

import errno
import json
import logging
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import DOCUMENTS, VOCABULARY, write_corpus

from slope_megatron.data import corpus as corpus_module
from slope_megatron.data import encode as encode_module
from slope_megatron.data.indexed import megatron_datasets, unigram_entropy
from slope_megatron.data.prepare import prepare
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.sources import open_source
from slope_megatron.data.splits import SPLITS
from slope_megatron.data.tokenizer import load_tokenizer

SETTINGS = {"vocab_size": VOCABULARY, "valid_percent": 10, "test_percent": 5}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def documents_of(folder, split):
    """Token lists of one split, read back from the files."""
    dataset = megatron_datasets("indexed_dataset").IndexedDataset(str(folder / split))
    return [dataset[number].tolist() for number in range(len(dataset))]


@pytest.mark.parametrize("workers", [1, 3])
def test_two_prepares_give_identical_bytes(corpus_folder, prepared, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(corpus_module, "PART", 20_000)
    prepare(str(corpus_folder), tmp_path / "again", workers=workers, **SETTINGS)
    assert content(tmp_path / "again") == content(prepared)
    assert set(content(prepared)) == {
        "manifest.json",
        "tokenizer.model",
        *(f"{split}.{end}" for split in SPLITS for end in ("bin", "idx")),
    }


def test_reading_back_gives_the_documents_each_in_one_split(corpus_folder, prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    expected = Counter(text for _, text in open_source(str(corpus_folder), PrepareSettings()).documents())
    found = Counter()
    for split in SPLITS:
        for ids in documents_of(prepared, split):
            assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
            text = tokenizer.decode(ids)
            assert tokenizer.encode(text) == ids[:-1]
            found[text] += 1
    # Every document is there as often as in the corpus; none twice, so none in two splits.
    assert found == expected
    assert sum(found.values()) == DOCUMENTS


def test_the_manifests_figures_are_true(corpus_folder, prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    texts = [text for _, text in open_source(str(corpus_folder), PrepareSettings()).documents()]
    assert manifest["corpus"]["documents"] == DOCUMENTS
    assert manifest["corpus"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert (manifest["vocab_size"], manifest["eod"]) == (tokenizer.vocab_size, tokenizer.eod)
    assert manifest["dtype"] == "uint16"
    for split in SPLITS:
        figures = manifest["splits"][split]
        tokens = np.fromfile(prepared / f"{split}.bin", dtype=np.uint16)
        documents = documents_of(prepared, split)
        assert figures["tokens"] == len(tokens) == sum(map(len, documents))
        assert figures["documents"] == len(documents) == (tokens == tokenizer.eod).sum() > 0
        assert figures["bytes"] == sum(len(tokenizer.decode(ids).encode()) for ids in documents)
        shares = [count / len(tokens) for count in Counter(tokens.tolist()).values()]
        # Sums of at most 400 terms of one sign: well inside 1e-12.
        assert figures["unigram_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)


@pytest.mark.parametrize(("counts", "entropy"), [([5], 0.0), ([1, 1, 0], math.log(2)), ([3] * 8, math.log(8))])
def test_unigram_entropy(counts, entropy):
    assert unigram_entropy(np.array(counts)) == pytest.approx(entropy, abs=1e-15)


def test_records_are_split_by_their_text(tmp_path):
    records = [f"record {number} " * 20 for number in range(40)]
    for name, order in (("one", records), ("two", records[::-1] + records[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        prepare(str(tmp_path / f"{name}.jsonl"), tmp_path / name, vocab_size=280)
    texts = {}
    for name in ("one", "two"):
        tokenizer = load_tokenizer(tmp_path / name / "tokenizer.model")
        for split in SPLITS:
            texts[name, split] = {tokenizer.decode(ids) for ids in documents_of(tmp_path / name, split)}
    assert all(texts["one", split] == texts["two", split] for split in SPLITS)


def test_max_documents(corpus_folder, tmp_path):
    manifest = prepare(str(corpus_folder), tmp_path / "some", max_documents=10, vocab_size=350)
    assert manifest["corpus"]["documents"] == 10
    assert sum(split["documents"] for split in manifest["splits"].values()) == 10


def test_no_test_split(corpus_folder, tmp_path):
    manifest = prepare(str(corpus_folder), tmp_path / "data", vocab_size=VOCABULARY, test_percent=0)
    assert manifest["splits"]["test"] == {
        "documents": 0,
        "bytes": 0,
        "tokens": 0,
        "sequences": 0,
        "unigram_entropy": 0.0,
    }


def test_a_finished_folder_is_reused(corpus_folder, prepared, caplog):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    with caplog.at_level(logging.INFO, "slope_megatron"):
        manifest = prepare(str(corpus_folder), prepared, **SETTINGS)
    assert "already holds this corpus prepared with these settings: nothing to do" in caplog.text
    assert manifest == json.loads((prepared / "manifest.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_something_else_is_refused_unless_overwritten(prepared, corpus_folder, tmp_path):
    out = tmp_path / "data"
    shutil.copytree(prepared, out)
    (out / "cache").mkdir()
    with pytest.raises(ValueError, match=r"prepared with other settings \(vocab_size 400 then, 380 now\).*--overwrite"):
        prepare(str(corpus_folder), out, **{**SETTINGS, "vocab_size": 380})
    other = str(write_corpus(tmp_path / "other", seed=1))
    with pytest.raises(
        ValueError, match=r"holds another corpus \(source .*\): choose another folder, or .*--overwrite"
    ):
        prepare(other, out, **SETTINGS)
    assert content(out) == content(prepared)
    prepare(other, out, overwrite=True, **SETTINGS)
    assert content(out)["train.bin"] != content(prepared)["train.bin"]
    assert not (out / "cache").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "other"]


def test_what_prepare_did_not_write_is_never_replaced(prepared, corpus_folder, tmp_path):
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"files": {}}')
    mixed = tmp_path / "data"
    shutil.copytree(prepared, mixed)
    (mixed / "my-run").mkdir()
    for out, name in ((foreign, "manifest.json"), (mixed, "my-run")):
        with pytest.raises(ValueError, match=rf"did not write \({name}\): choose another folder"):
            prepare(str(corpus_folder), out, overwrite=True, **SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give the path of a folder"):
        prepare(str(corpus_folder), tmp_path / "file", overwrite=True, **SETTINGS)


def test_out_inside_the_source_is_refused(corpus_folder):
    with pytest.raises(ValueError, match=r"lies inside the source folder .*: choose a folder outside of it"):
        prepare(str(corpus_folder), corpus_folder / "data", **SETTINGS)


def test_a_failed_rename_puts_the_old_folder_back(prepared, corpus_folder, tmp_path, monkeypatch):
    from slope_megatron.data import scratch

    out = tmp_path / "data"
    shutil.copytree(prepared, out)
    rename = scratch.os.rename

    def fail_on_the_new(source, target):
        if source.name == "prepared":
            raise OSError("quota exceeded")
        rename(source, target)

    monkeypatch.setattr(scratch.os, "rename", fail_on_the_new)
    with pytest.raises(ValueError, match="quota exceeded"):
        prepare(str(corpus_folder), out, overwrite=True, **SETTINGS)
    assert content(out) == content(prepared)


def test_an_unwritable_place_is_refused(corpus_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .*/data: .*/file is a file; give the path of a folder"):
        prepare(str(corpus_folder), tmp_path / "file" / "data", **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "--vocab-size is 0: it must be positive"),
        ({"max_documents": 0}, "--max-documents is 0: it must be at least 1"),
        ({"valid_percent": -1}, "--valid-percent is -1.0 and --test-percent 2.0: they must not be negative"),
        ({"valid_percent": 60, "test_percent": 40}, "must leave something to train on"),
        ({"test_percent": math.nan}, "--test-percent nan"),
        ({"workers": 0}, "--workers is 0: it must be at least 1"),
        ({"kind": "t5"}, "--kind is 't5': it must be one of gpt, bert"),
        ({"bad_records": "eat"}, "--bad-records is 'eat': it must be one of refuse, skip"),
        ({"max_document_bytes": -1}, "--max-document-bytes is -1: it must be positive"),
        ({"split_seed": 1}, "--split-seed is 1 with --valid-percent 5.0 and --test-percent 2.0: such a split has two"),
        ({"split_seed": 1, "test_percent": 0, "deduplicate": True}, "with --deduplicate: a published split numbers"),
        (
            {"tokenizer": "nowhere"},
            "--tokenizer is nowhere: it must be one of sentencepiece, bpe, wordpiece, or a file",
        ),
        ({"kind": "bert", "tokenizer": "bpe"}, "--tokenizer is bpe with --kind bert: it needs a WordPiece vocabulary"),
    ],
)
def test_bad_settings_are_refused(corpus_folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(str(corpus_folder), tmp_path / "data", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_published_split_and_a_given_tokenizer(corpus_folder, prepared, tmp_path):
    """The tokenizer of one prepare serves another; and the command in the manifest gives the same bytes."""
    import shlex

    from slope_megatron.cli import main

    settings = {"tokenizer": str(prepared), "valid_percent": 12.5, "test_percent": 0, "split_seed": 7}
    manifest = prepare(str(corpus_folder), tmp_path / "data", **settings)
    assert manifest["splits"]["valid"]["documents"] == DOCUMENTS // 8
    assert manifest["tokenizer"] == json.loads((prepared / "manifest.json").read_text())["tokenizer"]
    assert (tmp_path / "data" / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()
    program, *words = shlex.split(manifest["command"])
    assert program == "slope" and main([*words, "--out", str(tmp_path / "again"), "--workers", "3"]) == 0
    assert content(tmp_path / "again") == content(tmp_path / "data")


def test_the_file_of_a_published_tokenizer_is_written_as_training_uses_it(tmp_path, caplog):
    """A post-processor's BOS, a truncation and a spelt end are in no document, and not in the folder's tokenizer."""
    from helpers.tokenizer_forms import EOS, cut_and_filled, hard_texts

    caplog.set_level("INFO")
    given = cut_and_filled()
    (tmp_path / "given").mkdir()
    given.save(str(tmp_path / "given" / "tokenizer.json"))
    (tmp_path / "given" / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    texts = [f"{text} {number}" for number, text in enumerate(hard_texts(20))]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    chosen = {"tokenizer": str(tmp_path / "given"), "valid_percent": 0, "test_percent": 0}
    manifest = prepare(str(tmp_path / "texts.jsonl"), tmp_path / "data", workers=1, **chosen)
    assert "left out, here and in an exported model: truncation, padding, the post-processor" in caplog.text
    written = json.loads((tmp_path / "data" / "tokenizer.json").read_text())
    assert [written[name] for name in ("truncation", "padding", "post_processor")] == [None] * 3
    given.no_truncation()
    given.no_padding()
    given.encode_special_tokens = True
    expected = [[*given.encode(text, add_special_tokens=False).ids, manifest["eod"]] for text in texts]
    assert documents_of(tmp_path / "data", "train") == expected
    assert all(ids.count(manifest["eod"]) == 1 for ids in expected)


def test_long_documents_are_encoded_in_pieces_and_stay_one_document(corpus_folder, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "LONGEST_PIECE", 100)
    manifest = prepare(str(corpus_folder), tmp_path / "data", workers=1, **SETTINGS)
    tokenizer = load_tokenizer(tmp_path / "data")
    texts = {text for _, text in open_source(str(corpus_folder), PrepareSettings()).documents()}
    for split in SPLITS:
        documents = documents_of(tmp_path / "data", split)
        assert len(documents) == manifest["splits"][split]["documents"]
        assert {tokenizer.decode(ids) for ids in documents} <= texts


def test_a_link_is_followed_and_stays(corpus_folder, tmp_path):
    """Home's quota is small, the data belongs on another disk."""
    large, link = tmp_path / "scratch" / "data", tmp_path / "home" / "data"
    large.mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(large)
    for overwrite in (False, True):
        prepare(str(corpus_folder), link, overwrite=overwrite, **SETTINGS)
        assert link.is_symlink() and (large / "manifest.json").is_file()
        assert [path.name for path in link.parent.iterdir()] == ["data"], "nothing is written on the small disk"


def test_a_mounted_disk_is_filled(prepared, corpus_folder, tmp_path, monkeypatch, caplog):
    """It can be neither renamed nor replaced."""
    from slope_megatron.storage import folders

    out = tmp_path / "data"
    out.mkdir()
    rename = folders.os.rename

    def busy(source, target):
        if out in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(folders.os, "rename", busy)
    prepare(str(corpus_folder), out, **SETTINGS)
    assert content(out) == content(prepared) and "it is filled file by file" in caplog.text
