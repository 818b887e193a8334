"""A SentencePiece model in the form of a `tokenizer.json`, for `transformers` and for models that need it.

A BPE model that does not normalise its text has an exact one: the same ids for every text. Others (Unigram, NFKC) have
one that differs from SentencePiece for a few rare texts, so that form is used from the start, in training too.

SentencePiece writes a space as U+2581. Here a piece is written with the space itself: a true U+2581 of a text is then
an unknown character, which is spelt in bytes.
"""

from slope_megatron.data.tokenizer_json import PROBES

SPACE_SIGN = "\u2581"


def read_model(model: bytes):
    """The parsed model (`sentencepiece`'s own ModelProto); a ValueError where this is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as messages

    try:
        # Its classes are made at import, where a type checker does not see them.
        found = vars(messages)["ModelProto"].FromString(model)
    except DecodeError:
        found = None
    if found is None or not found.pieces:
        raise ValueError(
            "this is no SentencePiece model: give another file, or, if it is the prepared data's, prepare the "
            "data again"
        )
    return found


def is_exact(proto) -> bool:
    """Whether the JSON form gives SentencePiece's ids for every text: BPE, and the characters stay as they are."""
    return proto.trainer_spec.model_type == proto.trainer_spec.BPE and not proto.normalizer_spec.precompiled_charsmap


def loses_nothing(proto) -> bool:
    """Whether the model neither changes a text nor adds a space to it, and spells in bytes what has no piece."""
    rules = proto.normalizer_spec
    changes = rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces
    return proto.trainer_spec.byte_fallback and is_exact(proto) and not changes


def to_tokenizer_json(model: bytes, keep_space_sign: bool = False) -> str:
    """The text of a `tokenizer.json`, compared with SentencePiece over PROBES and, where it is exact, every piece.

    Args:
        keep_space_sign: U+2581 is a character like others; otherwise it is read as a space, as SentencePiece does.
    Raises:
        ValueError: the model does something to a text that a tokenizer.json cannot say.
    """
    import sentencepiece
    import tokenizers

    proto = read_model(model)
    kinds = proto.SentencePiece
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = tokenizers.Tokenizer(_model(proto, processor.unk_id()))
    steps = _normalisers(proto, keep_space_sign)
    if steps:
        tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    tokenizer.decoder = _decoder(proto, processor.unk_id())
    control = [piece.piece for piece in proto.pieces if piece.type == kinds.CONTROL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in control])
    # SentencePiece finds these before it cuts the rest.
    symbols = [_with_spaces(piece) for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in symbols])
    tokenizer.encode_special_tokens = True
    texts = list(PROBES)
    if is_exact(proto):
        texts += [_with_spaces(piece) for piece in proto.pieces] + [f"x{name} {name}" for name in symbols]
    for text in texts:
        if keep_space_sign and SPACE_SIGN in text:
            continue
        ids = processor.encode(text)
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != ids or tokenizer.decode(ids) != processor.decode(ids):
            raise ValueError(
                f"the SentencePiece model cuts {text!r} as no tokenizer.json can, so an exported model could not have "
                "the tokenizer it was trained with: use the model's tokenizer.json, if it has one, or another tokenizer"
            )
    return tokenizer.to_str()


def _with_spaces(piece) -> str:
    return piece.piece.replace(SPACE_SIGN, " ")


def _model(proto, unknown: int):
    """BPE: a merge is any cut of a piece into two pieces. SentencePiece merges the pair whose piece scores best."""
    from tokenizers import models

    names = [_with_spaces(piece) for piece in proto.pieces]
    settings = proto.trainer_spec
    if settings.model_type == settings.UNIGRAM:
        scores = [(name, piece.score) for name, piece in zip(names, proto.pieces, strict=True)]
        return models.Unigram(scores, unknown, settings.byte_fallback)
    if settings.model_type != settings.BPE:
        raise ValueError("the SentencePiece model is neither BPE nor Unigram: use one that is")
    merged = {name: token for token, name in enumerate(names) if proto.pieces[token].type == proto.SentencePiece.NORMAL}
    merges = []
    for name, token in merged.items():
        cuts = ((name[:at], name[at:]) for at in range(1, len(name)))
        known = ((left, right) for left, right in cuts if left in merged and right in merged)
        merges += [(-proto.pieces[token].score, merged[left], merged[right], left, right) for left, right in known]
    return models.BPE(
        vocab={name: token for token, name in enumerate(names)},
        merges=[(left, right) for *_, left, right in sorted(merges)],
        unk_token=names[unknown],
        fuse_unk=True,
        byte_fallback=settings.byte_fallback,
    )


def _normalisers(proto, keep_space_sign: bool) -> list:
    from tokenizers import Regex, normalizers

    rules = proto.normalizer_spec
    steps: list = [] if keep_space_sign else [normalizers.Replace(SPACE_SIGN, " ")]
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return steps


def _decoder(proto, unknown: int):
    from tokenizers import decoders

    steps: list = [decoders.Replace(_with_spaces(proto.pieces[unknown]), proto.trainer_spec.unk_surface)]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
