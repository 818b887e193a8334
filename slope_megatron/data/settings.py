"""PrepareSettings: everything that decides what `slope data prepare` writes, apart from the text itself."""

import dataclasses

from slope_megatron.data.formats import FORMATS

KINDS = ("gpt", "bert")
TRAINED = ("sentencepiece", "bpe", "wordpiece")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The number of workers is not here: it changes nothing that is written.

    Args:
        kind: `gpt`: a document is one sequence that ends with EOD; `bert`: it is a list of sentences.
        tokenizer: one of TRAINED, or where a finished one lies; None: what fits the kind.
        split_seed: split as `datasets`' `train_test_split(valid_percent / 100, seed)` does, and not by hash.
        format: what local files hold, whatever their suffix; auto: their suffixes tell, and all must tell the same.
        include: patterns of the files of a folder that are read, with commas; empty: all of the one format.
        bad_records: `refuse` or `skip` records that cannot be read.
        max_document_bytes: longer documents are passed over; 0: none is.
        eod: the token that ends a document, where the tokenizer does not say.
        lowercase: WordPiece lower-cases and drops accents (BERT "uncased").
    """

    kind: str = "gpt"
    tokenizer: str | None = None
    vocab_size: int = 4096
    text_key: str = "text"
    format: str = "auto"
    include: str = ""
    valid_percent: float = 5.0
    test_percent: float = 2.0
    split_seed: int | None = None
    max_documents: int | None = None
    deduplicate: bool = False
    bad_records: str = "refuse"
    max_document_bytes: int = 0
    eod: str | None = None
    lowercase: bool = True

    def __post_init__(self):
        # 0 and 0.0 are the same setting, and must be the same bytes in the manifest.
        for name in ("valid_percent", "test_percent"):
            object.__setattr__(self, name, float(getattr(self, name)))
        choices_of = {"kind": KINDS, "format": ("auto", *FORMATS), "bad_records": ("refuse", "skip")}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)!r}: it must be one of {', '.join(choices)}")
        if self.vocab_size < 1:
            raise ValueError(f"--vocab-size is {self.vocab_size}: it must be positive; take 4096, say")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(
                f"--max-documents is {self.max_documents}: it must be at least 1; leave it out to read them all"
            )
        if self.max_document_bytes < 0:
            raise ValueError(f"--max-document-bytes is {self.max_document_bytes}: it must be positive, or 0 for any")
        self._check_splits()

    def _check_splits(self) -> None:
        low = min(self.valid_percent, self.test_percent)
        # Written so that a NaN is refused too.
        if not (low >= 0 and self.valid_percent + self.test_percent < 100):
            raise ValueError(
                f"--valid-percent is {self.valid_percent} and --test-percent {self.test_percent}: they must not be "
                "negative and must leave something to train on; take 5 and 2, say"
            )
        if self.split_seed is None:
            return
        if self.test_percent or not self.valid_percent:
            raise ValueError(
                f"--split-seed is {self.split_seed} with --valid-percent {self.valid_percent} and --test-percent "
                f"{self.test_percent}: such a split has two parts; give --valid-percent and --test-percent 0"
            )
        if self.deduplicate:
            raise ValueError(
                f"--split-seed is {self.split_seed} with --deduplicate: a published split numbers all documents; "
                "leave one of them out"
            )

    def reading(self) -> dict:
        """Those that `open_source` takes."""
        return {
            "text_key": self.text_key,
            "refuse_bad_records": self.bad_records == "refuse",
            "max_document_bytes": self.max_document_bytes,
            "format": self.format,
            "include": self.include,
        }

    @property
    def tokenizer_or_default(self) -> str:
        return self.tokenizer or ("wordpiece" if self.kind == "bert" else "sentencepiece")
