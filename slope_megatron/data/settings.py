"""PrepareSettings: everything that decides what `slope data prepare` writes, apart from the text itself."""

import dataclasses

from slope_megatron.config.fields import COUNT, POSITIVE, Rule, check_fields, option
from slope_megatron.data.formats import FORMATS

TRAINED = ("sentencepiece", "bpe", "wordpiece")
# How the flags go by in the help.
TITLE = "text, tokenizer and splits"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Every field is a flag. The number of workers is not here: it changes nothing that is written."""

    kind: str = option(
        "gpt",
        "gpt: a document is a run of tokens that ends with EOD; bert: a list of sentences, for pairs",
        choices=("gpt", "bert"),
    )
    tokenizer: str | None = option(
        None,
        "trained on this text: sentencepiece, bpe (as GPT-2's) or wordpiece (as BERT's); or a finished one's path: "
        "tokenizer.model, tokenizer.json, or a folder of them, of vocab.json and merges.txt, or of vocab.txt "
        "(default: sentencepiece, or wordpiece for --kind bert)",
    )
    vocab_size: int = option(4096, "tokens of a tokenizer that is trained", must=POSITIVE)
    text_key: str = option("text", "where a record's text is: key of a .jsonl line, column of a dataset")
    format: str = option(
        "auto", "what local files hold (auto: their suffixes tell, and must agree)", choices=("auto", *FORMATS)
    )
    include: str = option("", "patterns of a folder's files that are read: '*.md,notes/*'; with --format, as that")
    valid_percent: float = option(5.0, "share of the documents for the valid split; 0: none")
    test_percent: float = option(2.0, "share of the documents for the test split; 0: none")
    split_seed: int | None = option(
        None,
        "split as `train_test_split(valid_percent / 100, seed)` of `datasets` does, for published splits "
        "(default: by hash)",
    )
    max_documents: int | None = option(None, "read the first so many of each source (default: all of them)", must=COUNT)
    deduplicate: bool = option(False, "keep the first of several equal documents")
    bad_records: str = option(
        "refuse",
        "records that cannot be read end the prepare, or are counted and passed over",
        choices=("refuse", "skip"),
    )
    max_document_bytes: int = option(
        0,
        "documents longer than this are counted and passed over; 0: none is too long",
        must=Rule("it must be positive, or 0 for any", lambda value: value >= 0),
    )
    eod: str | None = option(None, "end-of-document token of a finished tokenizer (default: what its files say)")
    lowercase: bool = option(
        True,
        "WordPiece lower-cases and drops accents (--no-lowercase: BERT cased), where the tokenizer's files do not say",
    )

    def __post_init__(self):
        # 0 and 0.0 are the same setting, and must be the same bytes in the manifest.
        for name in ("valid_percent", "test_percent"):
            object.__setattr__(self, name, float(getattr(self, name)))
        check_fields(self)
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

    @property
    def tokenizer_or_default(self) -> str:
        return self.tokenizer or ("wordpiece" if self.kind == "bert" else "sentencepiece")
