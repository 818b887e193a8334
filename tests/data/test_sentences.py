"""Sentences are cut where a reader would cut them, and nothing is lost but white space."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_megatron.data.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." She left.', ['He said "no."', "She left."]),
        ("Dr. Smith saw J. Doe vs. Roe. Then, e.g. He ran.", ["Dr. Smith saw J. Doe vs. Roe.", "Then, e.g. He ran."]),
        ("It cost 3.50 in all, i.e. nothing. next", ["It cost 3.50 in all, i.e. nothing. next"]),
        ("A title\n\n  Its text... More.\r\n", ["A title", "Its text...", "More."]),
        ("Go to plan B. Then stop.", ["Go to plan B. Then stop."]),
        (" \n ", []),
        (
            "Form\x0cfeeds, U+0085\x85 and\u2028others end no line.",
            ["Form\x0cfeeds, U+0085\x85 and\u2028others end no line."],
        ),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


@given(st.lists(st.sampled_from(["Word", "word.", "A.", "?!", " ", "\n", '."', "3.", "é"])).map("".join))
def test_nothing_is_lost(text):
    found = split_sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in found)
