"""Text that grows token by token without broken characters."""

from typing import Protocol

# What a decoder writes for bytes that are not (yet) a character.
REPLACEMENT = "\ufffd"


class TextTokenizer(Protocol):
    """What generation asks of a tokenizer: those of `data.tokenizer`, with which the text was prepared."""

    eod: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


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
