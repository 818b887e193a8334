"""Sentences of a document, by rule: for BERT's pairs, which need cuts and not a grammar.

Nothing is downloaded for it (NLTK's punkt models are pickles). A sentence ends at `.`, `!` or `?` with the quotes and
brackets behind it, where white space and then no lower-case letter follow, unless the word is a known abbreviation or
a single initial; and a line end is an end.
"""

import re

from slope_megatron.config.text_file import lines_of

END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(?=\s+[^\sa-z])")
LAST_WORD = re.compile(r"(?:^|[\s(\"'])([^\s(\"']+)$")
ABBREVIATIONS = frozenset(
    """
    mr mrs ms dr prof st sr jr rev gen col lt capt sgt gov sen rep hon vs etc e.g i.e cf al fig figs eq eqs nos vol
    pp ed eds inc ltd co corp jan feb mar apr jun jul aug sep sept oct nov dec u.s u.k a.m p.m ph.d approx dept est
    """.split()
)


def split_sentences(text: str) -> list[str]:
    """The sentences of `text` without the white space around them; none of them is empty."""
    return [sentence for line in lines_of(text) for sentence in _sentences_of_line(line)]


def _sentences_of_line(line: str) -> list[str]:
    found, start = [], 0
    for match in END.finditer(line):
        if line[match.start()] == "." and _is_abbreviation(line[max(start, match.start() - 20) : match.start()]):
            continue
        found.append(line[start : match.end()])
        start = match.end()
    found.append(line[start:])
    return [stripped for sentence in found if (stripped := sentence.strip())]


def _is_abbreviation(before: str) -> bool:
    match = LAST_WORD.search(before)
    word = match[1] if match else ""
    return word.lower() in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word.isupper())
