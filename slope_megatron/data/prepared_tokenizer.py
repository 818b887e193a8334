"""The tokenizer of prepared data: a finished one, checked, or one that is trained on the training documents."""

import logging
from pathlib import Path

from slope_megatron.data.corpus import Corpus
from slope_megatron.data.fast_tokenizer import FastTokenizer, train_bpe, train_wordpiece
from slope_megatron.data.scratch import sealed_folder
from slope_megatron.data.settings import TRAINED, PrepareSettings
from slope_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer, training_chunks

# Bytes of training text that a tokenizer learns from, and for each of its tokens: seconds of work, and more would
# hardly change it.
TOKENIZER_SAMPLE = 4_000_000
SAMPLE_PER_TOKEN = 1000

logger = logging.getLogger(__name__)


def given_tokenizer(chosen: PrepareSettings) -> Tokenizer | FastTokenizer | None:
    """The finished tokenizer that was asked for; None: one is to be trained."""
    name = chosen.tokenizer_or_default
    if name in TRAINED:
        if chosen.eod is not None:
            raise ValueError(
                f"--eod is {chosen.eod!r} with --tokenizer {name}, which has an end of its own: leave it out"
            )
        tokenizer = None
    elif not Path(name).exists():
        raise ValueError(f"--tokenizer is {name}: it must be one of {', '.join(TRAINED)}, or a file or folder")
    else:
        tokenizer = load_tokenizer(name, eod=chosen.eod, lowercase=chosen.lowercase)
        _check_for_export(name, tokenizer)
    if chosen.kind == "bert":
        if name in ("sentencepiece", "bpe") or isinstance(tokenizer, Tokenizer):
            raise ValueError(f"--tokenizer is {name} with --kind bert: it needs a WordPiece vocabulary; take wordpiece")
        if tokenizer is not None and tokenizer.mark("pad") != 0:
            raise ValueError(f"the tokenizer {name} has [PAD] at {tokenizer.mark('pad')}: Megatron needs it at 0")
    return tokenizer


def _check_for_export(name: str, tokenizer: Tokenizer | FastTokenizer) -> None:
    """Say what of a tokenizer's file is left out; refuse one that an exported model could not have."""
    if isinstance(tokenizer, Tokenizer):
        tokenizer.to_json()
        return
    if tokenizer.unique_identifiers["class"] == Tokenizer.kind:
        logger.info(
            f"the tokenizer {name} is used in the form of a tokenizer.json: a text with rare characters, or one that "
            "spells a control symbol, may have other ids than SentencePiece gives it"
        )
    if tokenizer.left_out:
        left_out = ", ".join(tokenizer.left_out)
        logger.info(f"of the tokenizer {name} these are left out, here and in an exported model: {left_out}")


def prepared_tokenizer(folder: Path, corpora, splits, chosen: PrepareSettings, given) -> Tokenizer | FastTokenizer:
    """The tokenizer, whose files are then in `folder`."""
    if not folder.is_dir():
        tokenizer = given or _trained(corpora, splits, chosen)
        with sealed_folder(folder) as partial:
            for name, content in tokenizer.files.items():
                (partial / name).write_bytes(content)
    # As every later reader will: the files may say less than those that were given.
    return load_tokenizer(folder)


def _trained(corpora: list[Corpus], splits, chosen: PrepareSettings) -> Tokenizer | FastTokenizer:
    size = sum(int(corpus.bytes_D[splits_D == 0].sum()) for corpus, splits_D in zip(corpora, splits, strict=True))
    share = max(TOKENIZER_SAMPLE, SAMPLE_PER_TOKEN * chosen.vocab_size) / max(1, size)
    documents = ((corpus.texts(), splits_D) for corpus, splits_D in zip(corpora, splits, strict=True))
    training = (
        text for texts, splits_D in documents for text, split in zip(texts, splits_D, strict=True) if split == 0
    )
    chunks = training_chunks(training, share)
    tokenizer: Tokenizer | FastTokenizer
    if chosen.tokenizer_or_default == "sentencepiece":
        tokenizer = Tokenizer(train_tokenizer(chunks, chosen.vocab_size))
    elif chosen.tokenizer_or_default == "bpe":
        tokenizer = train_bpe(chunks, chosen.vocab_size)
    else:
        tokenizer = train_wordpiece(chunks, chosen.vocab_size, chosen.lowercase)
    logger.info(f"trained a tokenizer of {tokenizer.vocab_size:,} tokens on {min(1.0, share):.0%} of the training text")
    return tokenizer
