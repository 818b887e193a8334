"""The tokenizer loses nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_megatron.data.tokenizer import CHUNK, EOD, Tokenizer, load_tokenizer, train_tokenizer, training_chunks

TEXT = "def function(argument):\n    return argument + 1\n\n\n\tclass Name: ξ <s> </s> <unk> <eod> \u2581\r\n" * 40
MODEL = train_tokenizer([TEXT], 340)
TOKENIZER = Tokenizer(MODEL)
# Spaces in every place, what stands for a space inside SentencePiece, its own symbols, bytes that look like tokens.
TRICKY = [
    "\u2581",
    " ",
    "  ",
    "\n",
    "\t",
    "\r",
    "\0",
    EOD,
    "<unk>",
    "<0x0A>",
    "\u2585",
    "\u2047",
    "\ufeff",
    "e\u0301",
    "return",
]

any_text = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=3))).map("".join))


@given(any_text)
def test_decode_undoes_encode(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([*ids, TOKENIZER.eod]) == text
    # What is written in a document never ends it.
    assert TOKENIZER.eod not in ids
    assert all(0 <= token < TOKENIZER.vocab_size for token in ids)


@given(st.lists(any_text, max_size=4))
def test_encode_all_encodes_each(texts):
    assert TOKENIZER.encode_all(texts) == [TOKENIZER.encode(text) for text in texts]


def test_it_has_learnt_something():
    assert len(TOKENIZER.encode(TEXT)) < len(TEXT) / 2


def test_line_ends_and_indents_are_learnt_as_they_are():
    # One token holds the indent, so the newline and it are fewer tokens than characters.
    assert len(TOKENIZER.encode("\n    return")) <= 3
    assert len(TOKENIZER.encode("\t")) == 1


def test_what_megatron_asks_for():
    assert TOKENIZER.vocab_size == 340
    assert 0 <= TOKENIZER.eod < 340
    assert not hasattr(TOKENIZER, "pad")
    assert TOKENIZER.unique_identifiers["sha256"] == Tokenizer(MODEL).unique_identifiers["sha256"]


def test_training_is_deterministic():
    assert train_tokenizer([TEXT], 340) == MODEL


@pytest.mark.parametrize(
    ("chunks", "size", "message"),
    [
        ([TEXT], 9000, r"--vocab-size is 9000: this corpus yields at most (\d+) tokens; give --vocab-size \1 or less"),
        ([TEXT], 200, r"--vocab-size is 200: bytes and single .* alone take (\d+); give --vocab-size \1 or more"),
        ([], 400, "the corpus has nothing to train a tokenizer on: give a source with more text"),
        (["\n"], 400, "nothing to train a tokenizer on|at most"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(chunks, size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(chunks, size)


def test_the_size_named_as_the_way_out_works():
    with pytest.raises(ValueError) as refusal:
        train_tokenizer([TEXT], 9000)
    most = int(str(refusal.value).split("at most ")[1].split()[0])
    assert Tokenizer(train_tokenizer([TEXT], most)).vocab_size == most


def test_models_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer .*no.model does not exist: give a folder"):
        load_tokenizer(tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"tokenizer .*bad.model: this is no SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_a_model_without_eod_is_refused(tmp_path):
    import sentencepiece

    prefix = tmp_path / "plain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words and some more words"]),
        model_prefix=str(prefix),
        vocab_size=14,
        eos_id=-1,
        minloglevel=9,
    )
    with pytest.raises(ValueError, match="has neither <eod> nor an end-of-sentence symbol: use one"):
        load_tokenizer(f"{prefix}.model")


@given(st.lists(st.text(alphabet="ab\n", max_size=3 * CHUNK), max_size=3))
def test_all_chunks_are_all_text(texts):
    chunks = list(training_chunks(texts, 1.0))
    assert "".join(chunks) == "".join(texts)
    assert all(0 < len(chunk) <= CHUNK for chunk in chunks)


def test_a_share_of_the_chunks_is_that_share_and_the_same_each_time():
    texts = ["line of text\n" * 2000] * 30
    whole = list(training_chunks(texts, 1.0))
    some = list(training_chunks(texts, 0.25))
    assert some == list(training_chunks(texts, 0.25))
    # Binomial with n = 390: 0.25 +- 5 standard deviations of 0.022.
    assert 0.14 < len(some) / len(whole) < 0.36
