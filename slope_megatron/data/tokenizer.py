"""SentencePiece tokenizers; the one trained here loses nothing: decode(encode(text)) == text for every text."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from slope_megatron.data.fast_tokenizer import FAST_FILES, FastTokenizer, load_fast_tokenizer

EOD = "<eod>"
SENTENCEPIECE_FILE = "tokenizer.model"
# Where a folder holds several, the first one counts.
TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE_FILE, *FAST_FILES)
# SentencePiece writes a space as this character and reads it back as a space; a true one must go around it.
SPACE_SIGN = "\u2581"
# Characters. Long enough for runs of empty lines to be seen, short enough to sample finely.
CHUNK = 2000


class Tokenizer:
    """Text to token ids and back. `eod`, `vocab_size` and `unique_identifiers` are what Megatron's datasets ask for.

    There is deliberately no `pad`: Megatron masks the loss of every token of that id.
    """

    kind = "SentencePiece"

    def __init__(self, model: bytes):
        """`model`: the bytes of a SentencePiece model with an `<eod>` symbol, or failing that with `</s>`."""
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.piece_to_id(EOD)
        # Only a model that neither normalises nor adds a space can be fed the text in parts.
        self._lossless = self._processor.is_control(self.eod)
        if not self._lossless:
            self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(
                f"the tokenizer has neither {EOD} nor an end-of-sentence symbol: use one that `slope data prepare` "
                f"wrote, or train it with --control_symbols={EOD}"
            )
        self._space_sign = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        self._files = {SENTENCEPIECE_FILE: model}
        # Goes into the names of Megatron's cached indices.
        self.unique_identifiers = {"class": self.kind, "sha256": hashlib.sha256(model).hexdigest()}

    @property
    def files(self) -> dict[str, bytes]:
        """`{file name: content}` from which `load_tokenizer` makes this tokenizer again."""
        return self._files

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

    def encode_all(self, texts: list[str], workers: int = 1) -> list[list[int]]:
        """`encode` of each text, on `workers` threads."""
        special = self._lossless and any(SPACE_SIGN in text for text in texts)
        plain = [text for text in texts if SPACE_SIGN not in text] if special else texts
        encoded = self._processor.encode(plain, num_threads=workers)
        if not special:
            return encoded
        rest = iter(encoded)
        return [self.encode(text) if SPACE_SIGN in text else next(rest) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; EOD is nothing."""
        return self._processor.decode([int(token) for token in ids])


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
        found = next((path / name for name in TOKENIZER_FILES if (path / name).is_file()), None)
        if found is None:
            raise ValueError(
                f"{path} holds no tokenizer: it must hold one of tokenizer.json, tokenizer.model, "
                "vocab.json with merges.txt, or vocab.txt"
            )
        path = found
    if path.name in TOKENIZER_FILES and path.name != SENTENCEPIECE_FILE:
        return load_fast_tokenizer(path, eod, lowercase)
    try:
        return Tokenizer(path.read_bytes())
    except RuntimeError as failure:
        raise ValueError(
            f"tokenizer {path} is no SentencePiece model: give another file, or, if it is the "
            "prepared data's, prepare the data again"
        ) from failure


def training_chunks(texts: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the texts, in pieces of whole lines. Which pieces is a function of their position alone."""
    for document, text in enumerate(texts):
        start = 0
        while start < len(text):
            line_end = text.rfind("\n", start, start + CHUNK) + 1
            end = line_end if line_end > start and start + CHUNK < len(text) else start + CHUNK
            place = hashlib.blake2b(f"{document}:{start}".encode(), digest_size=8).digest()
            if int.from_bytes(place, "big") < share * 2**64:
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
