"""Tokenizers at inference, and text that grows token by token without broken characters."""

import json
from pathlib import Path
from typing import Protocol

# What a decoder writes for bytes that are not (yet) a character.
REPLACEMENT = "\ufffd"
EOD_NAMES = ("<eod>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")


class TextTokenizer(Protocol):
    """What generation asks of a tokenizer."""

    eod: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def named_eod(file: Path) -> tuple[str, ...]:
    """The end of a document as the tokenizer_config.json beside a tokenizer names it."""
    settings = file.with_name("tokenizer_config.json")
    named = json.loads(settings.read_text()).get("eos_token") if settings.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named
    return (named,) if named else ()


class SentencePieceText:
    """A SentencePiece model file. A literal U+2581, which SentencePiece takes for a space, goes in as bytes."""

    def __init__(self, path: Path):
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        unknown = self.processor.unk_id()
        known = [self.processor.piece_to_id(name) for name in (*named_eod(path), *EOD_NAMES)]
        self.eod = next((token for token in known if token not in (unknown, -1)), None)
        self.space_sign = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split("\u2581")):
            ids += self.space_sign if number else []
            ids += self.processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(list(ids))


class JsonText:
    """A `tokenizer.json` of Hugging Face's `tokenizers`."""

    def __init__(self, path: Path):
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # As in training: what is written in a text never ends it.
        self.tokenizer.encode_special_tokens = True
        known = (self.tokenizer.token_to_id(name) for name in (*named_eod(path), *EOD_NAMES))
        self.eod = next((token for token in known if token is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a folder of data or of an exported model."""
    return next((folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()), None)


def load_text_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a file, or of a folder that has one.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    file = find_tokenizer(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise ValueError(f"{path} holds no tokenizer (tokenizer.model or tokenizer.json): give --tokenizer FILE")
    try:
        return JsonText(file) if file.suffix == ".json" else SentencePieceText(file)
    except Exception as error:  # each library has exceptions of its own for a damaged file
        raise ValueError(f"the tokenizer {file} cannot be read ({error}): give another --tokenizer") from None


class TextStream:
    """Turns tokens that arrive one by one into pieces of text; an unfinished UTF-8 sequence waits for its rest."""

    def __init__(self, tokenizer: TextTokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        # Some tokens that are shown already stay in view: a decoder may drop a leading space of its first token.
        self.ids = list(prompt[-8:])
        self.before, self.shown = 0, len(self.ids)

    def _rest(self) -> str:
        seen = self.tokenizer.decode(self.ids[self.before : self.shown])
        return self.tokenizer.decode(self.ids[self.before :])[len(seen) :]

    def push(self, token: int) -> str:
        """What can be shown now."""
        self.ids.append(token)
        rest = self._rest()
        if not rest or rest.endswith(REPLACEMENT):
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return rest

    def close(self) -> str:
        """What is left: bytes that never became a character."""
        return self._rest()
