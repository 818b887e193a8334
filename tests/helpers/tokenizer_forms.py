"""Small tokenizers of every form that `slope data prepare` takes, written to a folder each."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

WORDS = "the cat sat on a mat and then dog ran over hill UPPER \ufb01ne \u65e5 \u00c9t\u00e9 don't".split()
TEXTS = [" ".join(random.Random(number).choices(WORDS, k=20)) for number in range(200)]
TEXTS += ["def f(x):\n    return  x + 1\n\n\tclass Name: e\u0301 \u03be\r\n"] * 20
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# Where tokenizers differ; the spelling of special tokens, alone and within words.
HARD = [
    *("", " ", "  ", "   ", "\n", "\n\n", "\t", "\r", "\r\n", "\0", "a\0b", " x", "x ", "  two  spaces ", "\n    x"),
    *("\ufb01ne \uff11\u212b e\u0301", "\ufb01\u0301", " \u0301", "\u65e5\u672c \U0001f642", "\u200b\u200d\ufeff"),
    *("\U0001f469\u200d\U0001f467", "\u00a0x\u3000y\u2028z\x85\x0c", "\u0130 \u017f \u00df \ufdfa", "\U0010ffff"),
    *(
        "\u2581",
        "a\u2581b \u2581",
        "\u2047",
        "<0x0A>",
        "\u0120the",
        "##cat",
        "don't UPPER",
        "1234567 . , x .",
        "\u00ad",
    ),
    *("</s>", "<s>", "<unk>", "<eod>", EOS, BOS, "<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "<mask>"),
    *("the</s>cat", "x <eod> y", f"the{EOS}{EOS}", " [SEP] cat", "cat[MASK] x", "a </S> b", "<tool> cat<tool>"),
    *("\uff1c/s\uff1e", "catcatcat"),
]


def hard_texts(count: int, seed: int = 0) -> list[str]:
    """HARD, and random strings of its parts."""
    chance = random.Random(seed)
    atoms = [*HARD, *"abcdethsaon ", "the", "cat", " ", " ", "\n", "\u0301", "</", "s>", "[", "]", "<", "|>"]
    return [*HARD, *("".join(chance.choices(atoms, k=chance.randrange(1, 8))) for _ in range(count))]


def sentencepiece_model(**settings) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    chosen = {"vocab_size": 340, "hard_vocab_limit": False, "minloglevel": 9, "num_threads": 1, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **chosen)
    return model.getvalue()


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECE: dict[str, dict] = {
    "sp-as-llama2": {"model_type": "bpe", "byte_fallback": True, **IDENTITY},
    "sp-no-prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, **IDENTITY},
    "sp-no-bytes": {"model_type": "bpe", **IDENTITY},
    "sp-eod-that-normalises": {"model_type": "bpe", "control_symbols": ["<eod>"]},
    "sp-eod-with-prefix": {"model_type": "bpe", "byte_fallback": True, "control_symbols": ["<eod>"], **IDENTITY},
    "sp-user-defined": {
        **{"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
        **{"user_defined_symbols": ["<tool>", "cat"], **IDENTITY},
    },
    "sp-unigram": {"model_type": "unigram", "vocab_size": 120},
    "sp-unigram-identity": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 380, **IDENTITY},
    "sp-case-folded": {"model_type": "unigram", "vocab_size": 120, "normalization_rule_name": "nmt_nfkc_cf"},
}


def byte_level(**settings):
    """A byte-level BPE as LLaMA-3's: a post-processor that begins every text with BOS."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=settings.get("ignore_merges", False)))
    prefix = settings.get("add_prefix_space", False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(prefix, use_regex=settings.get("use_regex", True))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    template = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def roberta():
    from tokenizers import AddedToken, processors

    tokenizer = byte_level(add_prefix_space=True)
    tokenizer.add_special_tokens(["<s>", "</s>", AddedToken("<mask>", lstrip=True)])
    ends = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=True)
    return tokenizer


def with_added_tokens():
    """Added tokens that are read from a text, with every flag, and an end that is none of the special tokens."""
    from tokenizers import AddedToken

    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("hill", single_word=True), AddedToken("<eod>", lstrip=True, special=False)])
    return tokenizer


def cut_and_filled():
    tokenizer = byte_level()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=12, pad_id=1, pad_token=EOS)
    return tokenizer


def wordpiece(lowercase: bool = True, pair: bool = True):
    import tokenizers

    trained = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    trained.train_from_iterator(TEXTS, vocab_size=150, show_progress=False)
    return tokenizers.Tokenizer.from_str(trained.to_str())


def unigram(scheme: str, split: bool = True):
    """As T5's: the end of a text is a piece of the vocabulary, which the model itself could make of a text."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def words_only():
    """Whole words between spaces: a vocabulary that holds its special tokens like words."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    names = ["<unk>", "</s>", *WORDS]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


# Name -> how it is made, and its tokenizer_config.json.
JSON: dict[str, tuple[Callable, dict | None]] = {
    "as-llama3": (byte_level, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}),
    "ignored-merges": (lambda: byte_level(ignore_merges=True, use_regex=False), {"eos_token": EOS}),
    "prefix-space": (lambda: byte_level(add_prefix_space=True), None),
    "roberta": (roberta, {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True, "eos_token": "</s>"}),
    "added-tokens": (with_added_tokens, {"eos_token": {"content": "<eod>", "lstrip": True, "special": False}}),
    "cut-and-filled": (cut_and_filled, {"model_max_length": 5, "eos_token": EOS}),
    "add-bos-token": (
        byte_level,
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "eos_token": EOS},
    ),
    "wordpiece": (wordpiece, {"tokenizer_class": "BertTokenizer", "do_lower_case": True}),
    "wordpiece-cased": (lambda: wordpiece(lowercase=False), None),
    "unigram-first": (lambda: unigram("first"), {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"}),
    "unigram-always": (lambda: unigram("always"), {"eos_token": "</s>"}),
    "unigram-never-whole": (lambda: unigram("never", split=False), {"eos_token": "</s>"}),
    "words-only": (words_only, {"eos_token": "</s>"}),
}
FORMS = ["ours", *SENTENCEPIECE, *JSON, "gpt2-files", "bert-files"]


def write_form(name: str, folder: Path) -> Path:
    """The folder, with the files of that tokenizer as they are published."""
    from slope_megatron.data.tokenizer import train_tokenizer

    folder.mkdir(parents=True)
    if name == "ours":
        (folder / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, 360))
    elif name in SENTENCEPIECE:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(**SENTENCEPIECE[name]))
    elif name == "gpt2-files":
        byte_level().model.save(str(folder))
        (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True, "eos_token": EOS}))
    elif name == "bert-files":
        wordpiece().model.save(str(folder))
    else:
        make, config = JSON[name]
        make().save(str(folder / "tokenizer.json"))
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
