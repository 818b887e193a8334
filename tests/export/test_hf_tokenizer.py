"""SentencePiece models as tokenizer.json: the same ids, the same text, and what `transformers` makes of the folder."""

import random
import re
import sysconfig
from pathlib import Path

import pytest

from slope_megatron.data.prepared_tokenizer import given_tokenizer
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.tokenizer import load_tokenizer
from slope_megatron.data.tokenizer_json import open_json
from slope_megatron.export.hf_tokenizer import plan_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from slope_megatron.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [path.read_text() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 700))
    return folder


def samples():
    """Source text that it was not trained on, and random characters of several scripts."""
    texts = [path.read_text()[:4000] for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("h*.py"))[:3]]
    generator = random.Random(0)
    alphabet = "abc  \n\t(x)é€日🙂ߘ'\"-"
    more = ["", " ", "  x", "\u2581", "x \u2581y <eod></s>"]
    return [*texts, *("".join(generator.choices(alphabet, k=60)) for _ in range(50)), *more]


def test_ids_and_text_are_those_of_sentencepiece(folder):
    ours = load_tokenizer(folder / "tokenizer.model")
    theirs = open_json(ours.to_json())
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in samples():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text


def test_transformers_reads_the_folder(folder, tmp_path):
    import transformers

    ours = load_tokenizer(folder / "tokenizer.model")
    ids = write_tokenizer(ours, tmp_path, "gpt")
    assert plan_tokenizer(ours) == sorted(path.name for path in tmp_path.iterdir())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ids.eos == theirs.eos_token_id == ours.eod
    text = samples()[0]
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


def foreign_model(path, **settings):
    """A SentencePiece model that was trained elsewhere."""
    import io

    import sentencepiece

    content = io.BytesIO()
    sentences = ["The quick brown fox jumps over the lazy dog.", "def f(x): return x + 1", "UPPER \ufb01ne \u65e5"] * 99
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=content,
        vocab_size=340,
        hard_vocab_limit=False,
        minloglevel=9,
        **settings,
    )
    path.write_bytes(content.getvalue())
    return path


def test_a_model_that_puts_a_space_before_a_text(tmp_path):
    """As LLaMA's: BPE, bytes for what is unknown, nothing normalised."""
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    model = foreign_model(tmp_path / "tokenizer.model", model_type="bpe", allow_whitespace_only_pieces=True, **settings)
    ours = load_tokenizer(model)
    theirs = open_json(ours.to_json())
    assert ours.encode("fox") != load_tokenizer(model).encode(" fox")
    for text in samples():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text), text
        # Such a model, unlike ours, reads U+2581 as a space.
        assert theirs.decode(ids) == ours.decode(ids) == text.replace("\u2581", " ")


def prepared_with(model):
    return given_tokenizer(PrepareSettings(tokenizer=str(model)))


def test_a_model_that_normalises_is_a_tokenizer_json_from_the_start(tmp_path, caplog):
    """SentencePiece's defaults: NFKC, single spaces. For texts without rare characters the ids are its own."""
    import sentencepiece

    caplog.set_level("INFO")
    for model_type in ("bpe", "unigram"):
        model = foreign_model(tmp_path / f"{model_type}.model", model_type=model_type)
        tokenizer = prepared_with(model)
        assert "is used in the form of a tokenizer.json" in caplog.text
        assert sorted(tokenizer.files) == ["tokenizer.json", "tokenizer_config.json"]
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        for text in ("  the  quick\n fox ", "\ufb01ne UPPER \uff11", "\u65e5 \u2581x"):
            assert tokenizer.encode(text) == processor.encode(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "cuts 'x' as no tokenizer.json can"),
        ({"model_type": "bpe", "user_defined_symbols": ["fox"]}, "cuts 'fox' as no tokenizer.json can"),
        ({"model_type": "char"}, "is neither BPE nor Unigram"),
        (
            {"model_type": "bpe", "user_defined_symbols": ["</s>"]},
            "has neither <eod> nor an end-of-sentence symbol",
        ),
    ],
)
def test_a_model_that_has_no_such_form_is_refused_before_training(tmp_path, settings, message):
    chosen = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **settings}
    model = foreign_model(tmp_path / "tokenizer.model", **chosen)
    with pytest.raises(ValueError, match=re.escape(message)):
        prepared_with(model)


def test_an_end_that_a_sentencepiece_model_does_not_have_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="--eod is '</s>': this SentencePiece model ends a document with <eod>"):
        given_tokenizer(PrepareSettings(tokenizer=str(folder), eod="</s>"))
    with pytest.raises(ValueError, match="--eod is '</s>' with --tokenizer bpe, which has an end of its own"):
        given_tokenizer(PrepareSettings(tokenizer="bpe", eod="</s>"))
