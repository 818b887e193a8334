"""The tokenizer of an exported model, such that `transformers` gives a text the ids that training gave it.

tokenizer.json           the run's, or its SentencePiece model in that form; BERT's puts [CLS] and [SEP] around
tokenizer_config.json    names of special tokens; a text that spells one is text
tokenizer.model          the SentencePiece model itself, where the run has one
"""

import dataclasses
from pathlib import Path

from slope_megatron.data.fast_tokenizer import FAST_CONFIG, FAST_FILE, FastTokenizer, transformers_settings
from slope_megatron.data.tokenizer import Tokenizer
from slope_megatron.data.tokenizer_json import BERT_MARKS, first_difference, open_json
from slope_megatron.export.output_folder import write_json


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids that a configuration names; None: the tokenizer has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def plan_tokenizer(tokenizer: Tokenizer | FastTokenizer | None) -> list[str]:
    """Names of the files that will be written."""
    return sorted({*tokenizer.files, FAST_FILE, FAST_CONFIG}) if tokenizer is not None else []


def write_tokenizer(tokenizer: Tokenizer | FastTokenizer | None, target: Path, architecture: str) -> TokenIds:
    """Write the run's tokenizer in a form that `transformers` reads; returns its special tokens' ids.

    Args:
        architecture: `bert` was trained on `[CLS] A [SEP] B [SEP]`, `gpt` on the text alone.
    Raises:
        ValueError: the tokenizer has no such form, or none with the ids of training.
    """
    if tokenizer is None:
        return TokenIds()
    for name, file_content in tokenizer.files.items():
        (target / name).write_bytes(file_content)
    content = tokenizer.to_json()
    before: list[int] = []
    behind: list[int] = []
    # A document's end also begins the next one.
    names = {"bos_token": tokenizer.eod_text, "eos_token": tokenizer.eod_text}
    ids = TokenIds(bos=tokenizer.eod, eos=tokenizer.eod)
    if architecture == "bert":
        assert isinstance(tokenizer, FastTokenizer), "data of BERT's are prepared with no other"
        before, behind = [tokenizer.mark("cls")], [tokenizer.mark("sep")]
        content = _between_marks(content, tokenizer)
        found = {part: mark for part, mark in {**BERT_MARKS, "unk": "[UNK]"}.items() if tokenizer.has(mark)}
        names = {"eos_token": tokenizer.eod_text, **{f"{part}_token": mark for part, mark in found.items()}}
        ids = TokenIds(pad=tokenizer.mark("pad"))
    (target / FAST_FILE).write_text(content, encoding="utf-8")
    inputs = ["input_ids", *(["token_type_ids"] if architecture == "bert" else []), "attention_mask"]
    write_json(target / FAST_CONFIG, {**transformers_settings(content, names), "model_input_names": inputs})
    _check_written(target / FAST_FILE, tokenizer, before, behind)
    return ids


def _between_marks(content: str, tokenizer: FastTokenizer) -> str:
    """Fine-tuning asks the tokenizer for [CLS] A [SEP] B [SEP]."""
    from tokenizers import processors

    changed = open_json(content)
    sep, cls = ((BERT_MARKS[part], tokenizer.mark(part)) for part in ("sep", "cls"))
    changed.post_processor = processors.BertProcessing(sep, cls)
    return changed.to_str()


def _check_written(file: Path, tokenizer: Tokenizer | FastTokenizer, before: list[int], behind: list[int]) -> None:
    """
    Raises:
        ValueError: some text has other ids, or they another text, than in training.
    """
    written = open_json(file.read_text(encoding="utf-8"))
    text = first_difference(
        lambda text: [*before, *tokenizer.encode(text), *behind],
        lambda text: written.encode(text).ids,
        (tokenizer.eod_text, f"x{tokenizer.eod_text} x"),
    )
    if text is None:
        encoded = tokenizer.encode("  two  spaces\n\u65e5 don't")
        if written.decode(encoded) != tokenizer.decode(encoded):
            text = tokenizer.decode(encoded)
    if text is not None:
        raise ValueError(
            f"the exported tokenizer would treat {text!r} otherwise than training did: export with --tokenizer and the "
            "tokenizer.json that belongs to the run's tokenizer, or report this"
        )
