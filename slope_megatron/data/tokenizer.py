"""SentencePiece tokenizers; the one trained here loses nothing: decode(encode(text)) == text for every text."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from slope_megatron.data import sentencepiece_json
from slope_megatron.data.fast_tokenizer import FAST_FILES, FastTokenizer, load_fast_tokenizer
from slope_megatron.data.sentencepiece_json import SPACE_SIGN

EOD = "<eod>"
SENTENCEPIECE_FILE = "tokenizer.model"
# Where a folder holds several, the first one counts.
TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE_FILE, *FAST_FILES)
# Characters. Long enough for runs of empty lines to be seen, short enough to sample finely.
CHUNK = 2000


class Tokenizer:
    """Text to token ids and back. `eod`, `vocab_size` and `unique_identifiers` are what Megatron's datasets ask for.

    There is deliberately no `pad`: Megatron masks the loss of every token of that id.
    """

    kind = "SentencePiece"

    def __init__(self, model: bytes):
        """From the bytes of a SentencePiece model with an `<eod>` symbol, or failing that with `</s>`."""
        import sentencepiece

        proto = sentencepiece_json.read_model(model)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.piece_to_id(EOD)
        if not self._processor.is_control(self.eod):
            self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(
                f"the tokenizer has neither {EOD} nor an end-of-sentence symbol: use one that `slope data prepare` "
                f"wrote, or train it with --control_symbols={EOD}"
            )
        # SentencePiece reads U+2581 as a space. Our own models spell it in bytes: the text goes in in parts, which only
        # a model that changes nothing and adds no space allows.
        self._lossless = self.eod_text == EOD and sentencepiece_json.loses_nothing(proto)
        self._space_sign = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        # `{file name: content}` from which `load_tokenizer` makes this tokenizer again.
        self.files = {SENTENCEPIECE_FILE: model}
        # Goes into the names of Megatron's cached indices.
        self.unique_identifiers = {"class": self.kind, "sha256": hashlib.sha256(model).hexdigest()}

    @property
    def eod_text(self) -> str:
        return self._processor.id_to_piece(self.eod)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without EOD."""
        if not self._lossless:
            return self._processor.encode(text)
        ids = []
        for number, part in enumerate(text.split(SPACE_SIGN)):
            ids += self._space_sign if number else []
            ids += self._processor.encode(part)
        return ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""
        special = self._lossless and any(SPACE_SIGN in text for text in texts)
        plain = [text for text in texts if SPACE_SIGN not in text] if special else texts
        encoded = self._processor.encode(plain, num_threads=1)
        if not special:
            return encoded
        rest = iter(encoded)
        return [self.encode(text) if SPACE_SIGN in text else next(rest) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; EOD and other control symbols are nothing, as is what only a model's padding has."""
        return self._processor.decode([int(token) for token in ids if token < self.vocab_size])

    def to_json(self) -> str:
        """The text of a `tokenizer.json` with the same ids; a ValueError where there is none."""
        return sentencepiece_json.to_tokenizer_json(self.files[SENTENCEPIECE_FILE], self._lossless)


def load_tokenizer(path: str | Path, *, eod: str | None = None, lowercase: bool = True) -> Tokenizer | FastTokenizer:
    """The tokenizer of a file, or of a folder that holds one: a prepared folder, or one that a model came with.

    Args:
        path: `tokenizer.model` (SentencePiece), `tokenizer.json`, or a folder of one of them, or of `vocab.json` and
            `merges.txt` (GPT-2), or of `vocab.txt` (BERT).
        eod: the token that ends a document, where the files do not say.
        lowercase: for `vocab.txt` alone, which does not say.
    Raises:
        ValueError: no such file, no tokenizer, or one without an EOD symbol.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist: give a folder that `slope data prepare` wrote")
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise ValueError(
                f"{path} holds no tokenizer: it must hold one of tokenizer.json, tokenizer.model, "
                "vocab.json with merges.txt, or vocab.txt"
            )
        path = found
    if path.suffix in (".json", ".txt"):
        return load_fast_tokenizer(path, eod, lowercase)
    try:
        return _from_sentencepiece(path.read_bytes(), eod)
    except (ValueError, RuntimeError) as failure:  # SentencePiece's own is a RuntimeError
        raise ValueError(f"tokenizer {path}: {failure}") from failure


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in a folder of data or of a model."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def _from_sentencepiece(model: bytes, eod: str | None) -> Tokenizer | FastTokenizer:
    """SentencePiece itself where a tokenizer.json can give the same ids; otherwise that file, for all that follows."""
    tokenizer = Tokenizer(model)
    if not sentencepiece_json.is_exact(sentencepiece_json.read_model(model)):
        fast = FastTokenizer(sentencepiece_json.to_tokenizer_json(model), eod or tokenizer.eod_text)
        # Of the file that it comes from: an index of prepared data is found again by it.
        fast.unique_identifiers = {**tokenizer.unique_identifiers}
        return fast
    if eod not in (None, tokenizer.eod_text):
        raise ValueError(
            f"--eod is {eod!r}: this SentencePiece model ends a document with {tokenizer.eod_text}; leave --eod out"
        )
    return tokenizer


def training_chunks(texts: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the texts, in pieces of whole lines. Which pieces is a function of their position alone."""
    for document, text in enumerate(texts):
        start = 0
        while start < len(text):
            line_end = text.rfind("\n", start, start + CHUNK) + 1
            end = line_end if line_end > start and start + CHUNK < len(text) else start + CHUNK
            digest = hashlib.blake2b(f"{document}:{start}".encode(), digest_size=8).digest()
            if int.from_bytes(digest, "big") < share * 2**64:
                yield text[start:end]
            start = end


def train_tokenizer(chunks: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model of exactly `vocab_size` tokens: unknown, EOD, 256 bytes, and what was learnt.

    Raises:
        ValueError: the vocabulary is too large or too small for the text, or there is no text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            # Lossless: nothing is normalised, added or dropped, and what has no token is spelt in bytes.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            # No <s>, </s>, <pad>: they would be ids that no document ever uses.
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=[EOD],
            max_sentence_length=4 * CHUNK,
            num_threads=1,
            minloglevel=9,
        )
    except RuntimeError as failure:
        raise _explained(str(failure), vocab_size) from failure
    return model.getvalue()


def _explained(message: str, vocab_size: int) -> ValueError:
    """SentencePiece's failure in our words."""
    if most := re.search(r"too high .* value <= (\d+)", message):
        return ValueError(
            f"--vocab-size is {vocab_size}: this corpus yields at most {most[1]} tokens; "
            f"give --vocab-size {most[1]} or less, or more text"
        )
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return ValueError(
            f"--vocab-size is {vocab_size}: bytes and single characters of this corpus alone take {least[1]}; "
            f"give --vocab-size {least[1]} or more"
        )
    if "sentences_.empty()" in message:
        return ValueError("the corpus has nothing to train a tokenizer on: give a source with more text")
    return ValueError(f"SentencePiece could not train a tokenizer ({message}): check the source's text")
