"""One text, one row of ids: in prepared data, in prompts and scores, and in exports, for every form of tokenizer."""

import json

import pytest

from helpers.tokenizer_forms import FORMS, hard_texts, write_form
from slope_megatron.data.tokenizer import load_tokenizer
from slope_megatron.inference.text import TextStream

TEXTS = hard_texts(200)
FAMILIES = ("gpt2", "opt", "llama", "mistral")


@pytest.fixture(scope="module", params=FORMS)
def form(request, tmp_path_factory):
    """Its name, the tokenizer as `prepare` has it, its prepared folder, and the folder of an exported model."""
    from slope_megatron.data.prepared_tokenizer import given_tokenizer
    from slope_megatron.data.settings import PrepareSettings
    from slope_megatron.export.hf_tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp(request.param)
    given = given_tokenizer(PrepareSettings(tokenizer=str(write_form(request.param, folder / "given"))))
    for name in ("data", "exported"):
        (folder / name).mkdir()
    for name, content in given.files.items():
        (folder / "data" / name).write_bytes(content)
    write_tokenizer(load_tokenizer(folder / "data"), folder / "exported", "gpt")
    return request.param, given, folder / "data", folder / "exported"


def test_every_reader_gives_the_ids_of_training(form):
    import transformers

    name, given, data, exported = form
    trained = given.encode_all(TEXTS)
    assert trained == [given.encode(text) for text in TEXTS]
    assert load_tokenizer(data).files == given.files
    for folder in (data, exported):
        read = load_tokenizer(folder)
        assert [read.encode(text) for text in TEXTS] == trained
        assert (read.eod, read.eod_text, read.vocab_size) == (given.eod, given.eod_text, given.vocab_size)
    for family in FAMILIES:
        (exported / "config.json").write_text(json.dumps({"model_type": family}))
        theirs = transformers.AutoTokenizer.from_pretrained(exported)
        differing = [text for text, ids in zip(TEXTS, trained, strict=True) if theirs(text)["input_ids"] != ids]
        assert not differing, (name, family)
        assert theirs(TEXTS)["input_ids"] == trained
        assert theirs.bos_token_id == theirs.eos_token_id == given.eod
        assert set(theirs(TEXTS[0])) == {"input_ids", "attention_mask"}


def test_no_text_spells_the_end_of_a_document(form):
    _, given, _, _ = form
    spelt = [given.eod_text, f"the{given.eod_text}cat", f" {given.eod_text} ", 2 * given.eod_text]
    assert not any(given.eod in ids for ids in given.encode_all([*TEXTS, *spelt]))


def test_text_comes_back_as_the_exported_tokenizer_writes_it(form):
    import transformers

    _, given, _, exported = form
    (exported / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for text in TEXTS:
        ids = given.encode(text)
        whole = theirs.decode(ids, skip_special_tokens=True)
        assert given.decode(ids) == given.decode([*ids, given.eod]) == whole, text
        # As `slope generate` prints it, behind a prompt.
        prompt = given.encode("the cat")
        stream = TextStream(given, prompt)
        pieces = "".join([*(stream.push(token) for token in ids), stream.close()])
        assert given.decode(prompt) + pieces == theirs.decode([*prompt, *ids], skip_special_tokens=True), text


@pytest.mark.parametrize("name", ["wordpiece", "wordpiece-cased", "bert-files"])
def test_berts_texts_stand_between_its_marks(name, tmp_path):
    """As its training samples do, whatever the published file puts around a text; a mark in a text is text."""
    import transformers

    from slope_megatron.export.hf_tokenizer import write_tokenizer

    trained = load_tokenizer(write_form(name, tmp_path / "given"))
    (tmp_path / "exported").mkdir()
    ids = write_tokenizer(trained, tmp_path / "exported", "bert")
    (tmp_path / "exported" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    cls, sep, pad = (trained.mark(part) for part in ("cls", "sep", "pad"))
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id, ids.pad) == (cls, sep, pad, pad)
    for text in TEXTS:
        one = trained.encode(text)
        assert theirs(text)["input_ids"] == [cls, *one, sep]
        pair = theirs("the cat", text)
        if one:
            assert pair["input_ids"] == [cls, *trained.encode("the cat"), sep, *one, sep]
            assert pair["token_type_ids"][-len(one) - 1 :] == [1] * (len(one) + 1)
        assert not {cls, sep, pad, trained.mark("mask")} & set(one)
