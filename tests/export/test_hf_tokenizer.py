"""SentencePiece models as tokenizer.json: the same ids, the same text, and what `transformers` makes of the folder."""

import random
import sysconfig
from pathlib import Path

import pytest


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
    return [*texts, *("".join(generator.choices(alphabet, k=60)) for _ in range(50)), "", " ", "  x"]


def test_ids_and_text_are_those_of_sentencepiece(folder):
    from slope_megatron.data.tokenizer import load_tokenizer
    from slope_megatron.export.hf_tokenizer import from_sentencepiece

    ours, theirs = load_tokenizer(folder / "tokenizer.model"), from_sentencepiece(folder / "tokenizer.model")
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in samples():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text


def test_transformers_reads_the_folder(folder, tmp_path):
    import transformers

    from slope_megatron.data.tokenizer import load_tokenizer
    from slope_megatron.export.hf_tokenizer import plan_tokenizer, write_tokenizer

    ids = write_tokenizer(folder, tmp_path)
    assert plan_tokenizer(folder) == sorted(path.name for path in tmp_path.iterdir())
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(folder / "tokenizer.model")
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
    from slope_megatron.data.tokenizer import load_tokenizer
    from slope_megatron.export.hf_tokenizer import from_sentencepiece

    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    model = foreign_model(tmp_path / "tokenizer.model", model_type="bpe", allow_whitespace_only_pieces=True, **settings)
    ours, theirs = load_tokenizer(model), from_sentencepiece(model)
    assert ours.encode("fox") != load_tokenizer(model).encode(" fox")
    for text in samples():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text), text
        assert theirs.decode(ids) == ours.decode(ids) == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_model_that_has_no_such_form_is_refused(tmp_path, model_type):
    """SentencePiece's defaults normalise the text (NFKC, single spaces)."""
    from slope_megatron.export.hf_tokenizer import from_sentencepiece

    with pytest.raises(ValueError, match="it is no plain BPE model; give --tokenizer a folder"):
        from_sentencepiece(foreign_model(tmp_path / "tokenizer.model", model_type=model_type))
