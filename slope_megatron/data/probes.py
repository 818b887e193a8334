"""Texts at which tokenizers differ, and whether two of them do."""

from collections.abc import Callable

# What a normaliser, a dummy prefix, a post-processor, a pre-tokenizer or a byte fallback would show itself by.
PROBES = (
    "",
    " ",
    "x",
    " x",
    "x ",
    "  two  spaces ",
    "line\nend\r\n\tx",
    "\ufb01ne \uff11\u212b e\u0301",
    "UPPER case\u00a0\u3000x",
    "\u65e5\u672c \U0001f642\u200d\ufeff",
    "a\0b",
    "don't, 1234567 (x) .",
)
# How special tokens and bytes are written in files; in a text they are text.
SPELLINGS = ("<s>", "</s>", "<unk>", "<eod>", "<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "<0x0A>", "a \u2581b\u2581")


def first_difference(
    one: Callable[[str], list[int]], other: Callable[[str], list[int]], more: tuple[str, ...] = ()
) -> str | None:
    """The first of the texts, and of `more`, to which two functions give other ids; None: there is none."""
    texts = (*PROBES, *SPELLINGS, *more)
    return next((text for text in texts if list(one(text)) != list(other(text))), None)
