"""The part of a `tokenizer.json` that training uses, as a `tokenizer.json`: text to ids, nothing added, nothing cut.

A published file also says what to put around a text (post-processor), how to cut and fill batches, and which tokens are
read from a text that spells them. Prepared documents hold none of that; so the prepared file does not say it either,
and every reader of it, `transformers` too, gives the ids that the model was trained on; `first_difference` checks it.
"""

import json
import re
from collections.abc import Callable

# In a text these are text, whatever the file says of them.
BERT_MARKS = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
PLAIN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

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


def open_json(content: str):
    """A `tokenizers.Tokenizer` that takes the spelling of a special token for text."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as failure:  # the library raises plain Exception
        raise ValueError(f"this is no tokenizer.json ({failure}): give one of the `tokenizers` library") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def without_additions(tokenizer, content: str, eod: str):
    """The tokenizer of `content` as training uses it, its text (the same one where nothing had to change), and, for
    people, what was left out.

    Args:
        tokenizer: what `open_json` makes of `content`.
        eod: the token that ends a document; like BERT's marks, it becomes a special token.
    Raises:
        ValueError: a text can spell the end of a document, or one of BERT's marks, in spite of that.
    """
    fields = json.loads(content)
    added = fields.setdefault("added_tokens", [])
    changes = []
    for name in ("truncation", "padding"):
        if fields.get(name):
            fields[name] = None
            changes.append(name)
    if fields["model"].get("dropout"):
        fields["model"]["dropout"] = None
        changes.append("the dropout of merges")
    if any(tokenizer.num_special_tokens_to_add(is_pair=pair) for pair in (False, True)):
        fields["post_processor"] = None
        changes.append("the post-processor, which adds tokens to a text")
    marks = [name for name in dict.fromkeys([eod, *BERT_MARKS.values()]) if tokenizer.token_to_id(name) is not None]
    for name in marks:
        _make_special(added, name, tokenizer.token_to_id(name))
    tokenizer, content = _reopened(tokenizer, content, fields)
    spelt = _spelt(tokenizer, [token["content"] for token in added if token["special"]])
    # A text yields the unknown token whatever is cut.
    still = _spelt(open_json(json.dumps(_with_cuts(fields, spelt))), spelt) if spelt else []
    if spelt := [name for name in spelt if name not in still]:
        changes.append(f"the reading of {', '.join(spelt[:3])}{'...' if len(spelt) > 3 else ''} in a text")
        fields = _with_cuts(fields, spelt)
        tokenizer, content = _reopened(tokenizer, content, fields)
    if spelt := _spelt(tokenizer, marks):
        raise ValueError(
            f"a text can spell {spelt[0]!r}, which ends a document or is a mark of BERT's and must not occur in one: "
            "name another end with --eod, or use another tokenizer"
        )
    return tokenizer, content, changes


def _reopened(tokenizer, content: str, fields: dict):
    """The tokenizer and the text of `fields`; what there was if they say the same."""
    if fields == json.loads(content):
        return tokenizer, content
    content = json.dumps(fields, ensure_ascii=False, indent=2)
    return open_json(content), content


def _make_special(added: list[dict], name: str, token: int) -> None:
    """`transformers` gives the tokens that its configuration names these flags; here they have them already."""
    known = next((entry for entry in added if entry["content"] == name), None)
    if known is None:
        added.append({"id": token, "content": name, **PLAIN_FLAGS})
        # The library wants them by id.
        added.sort(key=lambda entry: entry["id"])
    else:
        known.update(PLAIN_FLAGS)


def _spelt(tokenizer, names: list[str]) -> list[str]:
    """Those tokens that the model itself makes of a text: its vocabulary holds them like words."""
    found = []
    for name in names:
        token = tokenizer.token_to_id(name)
        texts = (name, f" {name} ", f"x{name}x", tokenizer.decode([token], skip_special_tokens=False))
        if any(token in tokenizer.encode(text, add_special_tokens=False).ids for text in texts):
            found.append(name)
    return found


def _with_cuts(fields: dict, names: list[str]) -> dict:
    """A pre-tokenizer cuts these spellings behind their first character, then does what it did before."""
    patterns = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in sorted(names) if len(name) > 1]
    if not patterns:
        return fields
    split = {"type": "Split", "pattern": {"Regex": "|".join(patterns)}, "behavior": "Isolated", "invert": False}
    before = fields.get("pre_tokenizer")
    steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before] if before else []
    return {**fields, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, *steps]}}
