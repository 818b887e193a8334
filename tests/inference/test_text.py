"""Text that streams: every character whole, and together the decoded text."""

import pytest

from slope_megatron.data.tokenizer import load_tokenizer
from slope_megatron.inference.text import TextStream

TEXT = 'def naïve(x):\n    return "日本語 🙂 €" + x  # ▁ ok\n'


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    from slope_megatron.data.tokenizer import train_tokenizer

    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_tokenizer(["def f(x):\n    return x + 1\n" * 20, "for i in range(9): print(i)\n"], 300))
    return file


def test_pieces_are_whole_characters(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    for cut in (1, 4, 12, 28):
        stream = TextStream(tokenizer, tokenizer.encode(TEXT[:cut]))
        pieces = [stream.push(token) for token in tokenizer.encode(TEXT[cut:])] + [stream.close()]
        assert "".join(pieces) == TEXT[cut:]
        assert not any("\ufffd" in piece for piece in pieces)
        assert sum(piece == "" for piece in pieces) > 4, "bytes of one character arrive one by one"


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    stream = TextStream(tokenizer, tokenizer.encode("x"))
    euro = tokenizer.encode("€")
    assert len(euro) == 3 and stream.push(euro[0]) == "" and stream.push(euro[1]) == ""
    assert "\ufffd" in stream.close()
