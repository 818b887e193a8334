"""Tokenizers of the `tokenizers` library: `tokenizer.json`, GPT-2's and BERT's older files, and training of both."""

import collections
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from slope_megatron.data.tokenizer_json import BERT_MARKS, open_json, without_additions

FAST_FILE = "tokenizer.json"
FAST_CONFIG = "tokenizer_config.json"
# vocab.json needs merges.txt beside it.
FAST_FILES = (FAST_FILE, "vocab.json", "vocab.txt")
GPT2_EOD = "<|endoftext|>"
# Ends of a document as published models call them; BERT has none and ends a sentence instead.
KNOWN_EODS = (GPT2_EOD, "<|end_of_text|>", "<eod>", "</s>", "[SEP]")
# In this order their ids are 0 to 4 where the vocabulary is trained here; Megatron wants [PAD] to be 0.
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Characters of a trained WordPiece vocabulary; rarer ones are [UNK].
MAX_ALPHABET = 1000


class FastTokenizer:
    """Text to token ids and back, with what Megatron's datasets ask for; marks like `[CLS]` are never added.

    `left_out` says, for people, what the file asks for and prepared data does not hold.

    There is deliberately no `pad`: Megatron masks the loss of every token of that id.
    """

    kind = "tokenizers"

    def __init__(self, content: str, eod: str | None = None):
        """From the text of a `tokenizer.json`; the `eod` that ends a document is else the first of KNOWN_EODS."""
        given = open_json(content)
        self._vocabulary: dict[str, int] = given.get_vocab(with_added_tokens=True)
        # Ids may have holes; every id must have a row.
        self.vocab_size: int = max(self._vocabulary.values()) + 1
        self.eod_text = self._find_eod(eod)
        self.eod: int = self._vocabulary[self.eod_text]
        self._tokenizer, self._content, self.left_out = without_additions(given, content, self.eod_text)
        digest = hashlib.sha256(content.encode()).hexdigest()
        self.unique_identifiers = {"class": self.kind, "sha256": digest, "eod": self.eod}

    def _find_eod(self, eod: str | None) -> str:
        if eod is not None and eod not in self._vocabulary:
            raise ValueError(f"--eod is {eod!r}: the tokenizer has no such token; name one that it has")
        found = eod or next((name for name in KNOWN_EODS if name in self._vocabulary), None)
        if found is None:
            raise ValueError(
                f"the tokenizer has none of {', '.join(KNOWN_EODS)}: name the token that ends a document with --eod"
            )
        return found

    @property
    def files(self) -> dict[str, bytes]:
        """`{file name: content}` from which this tokenizer is made again, here and by `transformers`."""
        config = transformers_settings(self._content, {"eos_token": self.eod_text})
        return {FAST_FILE: self._content.encode(), FAST_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without EOD."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text; the library takes as many threads as TOKENIZERS_PARALLELISM allows."""
        return [encoded.ids for encoded in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; EOD and other special tokens are nothing."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The text of a `tokenizer.json` with the same ids."""
        return self._content

    def has(self, token: str) -> bool:
        return token in self._vocabulary

    def mark(self, name: str) -> int:
        """Id of one of BERT's marks, `pad`, `cls`, `sep` or `mask`; a ValueError where this is no BERT vocabulary."""
        text = BERT_MARKS[name]
        if text not in self._vocabulary:
            raise ValueError(f"the tokenizer has no {text}: BERT needs a WordPiece vocabulary with {text}")
        return self._vocabulary[text]

    @property
    def inverse_vocabulary(self) -> dict[int, str]:
        """`{id: token}`, by id: the library's own order changes from process to process."""
        return dict(sorted((number, token) for token, number in self._vocabulary.items()))


def transformers_settings(content: str, names: dict[str, str]) -> dict:
    """tokenizer_config.json for the tokenizer.json `content`; `names`: special tokens by their part, as eos_token."""
    first = json.loads(content).get("pre_tokenizer") or {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # A text that spells a special token is text, as in training.
        "split_special_tokens": True,
        # Some versions set it anew in a ByteLevel pre-tokenizer.
        "add_prefix_space": first.get("add_prefix_space", False),
        **names,
    }


def load_fast_tokenizer(path: Path, eod: str | None, lowercase: bool) -> FastTokenizer:
    """The tokenizer of a tokenizer.json, vocab.json (with merges.txt) or vocab.txt.

    Raises:
        ValueError: a file that is none or is missing, or no token to end a document with.
    """
    settings = _read_json(path.with_name(FAST_CONFIG)) if path.with_name(FAST_CONFIG).is_file() else {}
    if eod is None:
        named = settings.get("eos_token")
        eod = named.get("content") if isinstance(named, dict) else named
    try:
        if path.name == "vocab.json":
            content = _from_gpt2(path)
        elif path.name == "vocab.txt":
            content = _from_bert(path, settings.get("do_lower_case", lowercase))
        else:
            content = path.read_text(encoding="utf-8")
        return FastTokenizer(content, eod)
    except UnicodeDecodeError:
        raise ValueError(f"tokenizer {path} is not UTF-8: fetch it again") from None
    except ValueError as failure:
        raise ValueError(f"tokenizer {path}: {failure}") from None


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object: fetch it again")
    return content


def _lines(path: Path) -> list[str]:
    """The lines of a vocabulary; other characters that end a line somewhere (U+2028, a form feed) are tokens here."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _from_gpt2(path: Path) -> str:
    import tokenizers

    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise ValueError(f"{merges} is missing: GPT-2's tokenizer is the two files together")
    vocabulary = _read_json(path)
    pairs = [tuple(line.split(" ")) for line in _lines(merges) if line and not line.startswith("#version")]
    try:
        tokenizer = tokenizers.ByteLevelBPETokenizer(vocabulary, pairs)
    except Exception as failure:  # the library raises plain Exception
        raise ValueError(f"the files do not fit each other ({failure})") from None
    if GPT2_EOD in vocabulary:
        tokenizer.add_special_tokens([GPT2_EOD])
    return tokenizer.to_str()


def _from_bert(path: Path, lowercase: bool) -> str:
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(_lines(path))}
    missing = [mark for mark in BERT_SPECIAL if mark not in vocabulary]
    if missing:
        raise ValueError(f"a BERT vocabulary must have {', '.join(missing)}")
    tokenizer = tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=lowercase)
    tokenizer.add_special_tokens(BERT_SPECIAL)
    return tokenizer.to_str()


def train_bpe(chunks: Iterable[str], vocab_size: int) -> FastTokenizer:
    """A byte-level BPE as GPT-2's of 257 to `vocab_size` tokens; the same chunks give the same tokenizer."""
    import tokenizers

    if vocab_size < 257:
        raise ValueError(f"--vocab-size is {vocab_size}: bytes and {GPT2_EOD} alone take 257; give 257 or more")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(chunks, vocab_size=vocab_size, special_tokens=[GPT2_EOD], show_progress=False)
    return FastTokenizer(tokenizer.to_str(), GPT2_EOD)


def train_wordpiece(chunks: Iterable[str], vocab_size: int, lowercase: bool) -> FastTokenizer:
    """A WordPiece as BERT's of at most `vocab_size` tokens; the same chunks give the same tokenizer.

    The library numbers the `##` characters in the order of a hash table: here they are given to it, sorted.

    Raises:
        ValueError: the vocabulary is too small.
    """
    import tokenizers

    chunks = list(chunks)
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    counts: collections.Counter = collections.Counter()
    for chunk in chunks:
        counts.update(tokenizer.normalizer.normalize_str(chunk))
    frequent = sorted((-count, character) for character, count in counts.items() if not character.isspace())
    alphabet = sorted(character for _, character in frequent[:MAX_ALPHABET])
    first = [*BERT_SPECIAL, *(f"##{character}" for character in alphabet)]
    least = len(first) + len(alphabet)
    if vocab_size < least:
        raise ValueError(
            f"--vocab-size is {vocab_size}: marks and single characters of this corpus alone take {least}; "
            f"give --vocab-size {least} or more"
        )
    tokenizer.train_from_iterator(
        chunks,
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    # Made anew, so that the `##` characters are ordinary tokens again.
    trained = tokenizers.BertWordPieceTokenizer(tokenizer.get_vocab(), lowercase=lowercase)
    trained.add_special_tokens(BERT_SPECIAL)
    return FastTokenizer(trained.to_str(), BERT_MARKS["sep"])
