"""PrepareSettings: everything that decides what `slope data prepare` writes, apart from the text itself."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The number of workers is not here: it changes nothing that is written."""

    vocab_size: int = 4096
    text_key: str = "text"
    valid_percent: float = 5.0
    test_percent: float = 2.0
    max_documents: int | None = None

    def __post_init__(self):
        if self.vocab_size < 1:
            raise ValueError(f"--vocab-size is {self.vocab_size}: it must be positive; take 4096, say")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(
                f"--max-documents is {self.max_documents}: it must be at least 1; leave it out to read them all"
            )
        low = min(self.valid_percent, self.test_percent)
        # Written so that a NaN is refused too.
        if not (low >= 0 and self.valid_percent + self.test_percent < 100):
            raise ValueError(
                f"--valid-percent is {self.valid_percent} and --test-percent {self.test_percent}: they must not be "
                "negative and must leave something to train on; take 5 and 2, say"
            )
