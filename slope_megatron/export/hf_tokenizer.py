"""The tokenizer of an exported model: the run's files, and for a SentencePiece BPE model the same as tokenizer.json.

The JSON form gives the same ids as SentencePiece for text without U+2581, which either takes for a space.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from slope_megatron.export.output_folder import write_json
from slope_megatron.export.trained_run import TOKENIZER_FILES
from slope_megatron.inference.text import EOD_NAMES, named_eod

SPACE_SIGN = "\u2581"
# Where SentencePiece models differ in what they do to a text before they cut it, beside the pieces themselves.
PROBES = (
    "x",
    " x",
    "  two  spaces ",
    "line\nend\r\n\tx",
    "\ufb01ne \uff11\u212b e\u0301",
    "UPPER",
    "\u65e5\u672c \U0001f642",
    "",
)


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids that a configuration names; None: the tokenizer has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def plan_tokenizer(source: Path | None) -> list[str]:
    """Names of the files that will be written."""
    if source is None:
        return []
    files = [source] if source.is_file() else [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    names = {file.name for file in files}
    if names & {"tokenizer.model", "tokenizer.json"}:
        names |= {"tokenizer.json", "tokenizer_config.json"}
    return sorted(names)


def write_tokenizer(source: Path | None, target: Path) -> TokenIds:
    """Copy the run's tokenizer, in a form that `transformers` reads; returns its special tokens' ids."""
    if source is None:
        return TokenIds()
    files = [source] if source.is_file() else [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for file in files:
        shutil.copyfile(file, target / file.name)
    model = target / "tokenizer.model"
    if model.is_file() and not (target / "tokenizer.json").is_file():
        from_sentencepiece(model).save(str(target / "tokenizer.json"))
    if not (target / "tokenizer.json").is_file():
        return TokenIds()
    ids, names = special_tokens(target / "tokenizer.json")
    settings = target / "tokenizer_config.json"
    own = json.loads(settings.read_text()) if settings.is_file() else {}
    form = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(settings, {**form, **names, **own})
    return ids


def special_tokens(file: Path) -> tuple[TokenIds, dict[str, str]]:
    """Ids, and names as tokenizer_config.json has them. A document's end also begins the next one."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    end = next((name for name in (*named_eod(file), *EOD_NAMES) if tokenizer.token_to_id(name) is not None), None)
    if end is not None and tokenizer.token_to_id("[CLS]") is None:
        token = tokenizer.token_to_id(end)
        return TokenIds(bos=token, eos=token), {"bos_token": end, "eos_token": end}
    bert = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("cls", "sep", "pad", "mask", "unk")}
    found = {kind: tokenizer.token_to_id(name) for kind, name in bert.items()}
    ids = {kind: token for kind, token in found.items() if token is not None}
    if "cls_token" in ids and tokenizer.post_processor is None:
        # Fine-tuning asks the tokenizer for [CLS] A [SEP] B [SEP].
        sep, cls = ((bert[kind], ids[kind]) for kind in ("sep_token", "cls_token"))
        tokenizer.post_processor = tokenizers.processors.BertProcessing(sep, cls)
        tokenizer.save(str(file))
    return TokenIds(pad=ids.get("pad_token")), {kind: bert[kind] for kind in ids}


def from_sentencepiece(model: Path):
    """A `tokenizers.Tokenizer` for a SentencePiece BPE model that at most puts a space before a text: ours, LLaMA's.

    Raises:
        ValueError: the model does more to a text, or is no BPE: its ids would be others.

    A merge is any cut of a piece into two pieces; SentencePiece merges the pair whose piece has the best score, and
    scores fall with the id, so the merges are in the order of the pieces they make.
    """
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(processor.vocab_size())
    pieces = [processor.id_to_piece(token) for token in ids]
    plain = {
        piece: token
        for token, piece in enumerate(pieces)
        if not (processor.is_control(token) or processor.is_byte(token) or processor.is_unknown(token))
    }
    merges = []
    for piece, token in plain.items():
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = ((left, right) for left, right in cuts if left in plain and right in plain)
        merges += sorted((plain[left], plain[right], token, left, right) for left, right in known)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: token for token, piece in enumerate(pieces)},
            merges=[(left, right) for *_, left, right in sorted(merges, key=lambda m: -processor.get_score(m[2]))],
            unk_token=processor.id_to_piece(processor.unk_id()),
            fuse_unk=False,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_SIGN)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE_SIGN, " "), decoders.ByteFallback(), decoders.Fuse()])
    if processor.id_to_piece(processor.encode("x")[0]).startswith(SPACE_SIGN):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_SIGN), tokenizer.normalizer])
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    control = [pieces[token] for token in ids if processor.is_control(token)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in control])
    for text in (*PROBES, *(piece.replace(SPACE_SIGN, " ") for piece in plain)):
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise ValueError(
                f"the tokenizer {model.name} cuts {text!r} otherwise than a tokenizer.json made of it would: it is no "
                "plain BPE model; give --tokenizer a folder with the tokenizer.json that belongs to it"
            )
    return tokenizer
