"""A BERT run of a few words, and its tokenizer."""

import json

import torch

from helpers.runs import made_run

WORDS = "red green blue cat dog cow who what has the ? .".split()


def exported_bert(ranks, folder):
    """Exported folders of one BERT run: 2:4 weights with the adapters beside them, and folded; returns `folder`."""
    from slope_megatron.export import hf_export
    from slope_megatron.export.trained_run import TrainedRun

    data = folder / "data"
    data.mkdir()
    write_tokenizer(data / "tokenizer.json")
    made_run(ranks, folder / "run", "bert", max_position_embeddings=48, data=data, std=0.05)
    for name, adapters, dtype in (
        *(("lora", "lora", "fp32"), ("fold", "fold", "fp32")),
        *(("bf16", "lora", "bf16"), ("fp16", "lora", "fp16")),
    ):
        hf_export.export(hf_export.plan(TrainedRun(folder / "run"), adapters=adapters, dtype=dtype), folder / name)
    return folder


def write_tokenizer(path):
    """Words as BERT's WordPiece has them: special tokens, single characters, then the words."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))


def squad_file(path, count, seed):
    """Eight words of which one is a colour, and the question `what ?`: the answer is the colour, wherever it stands."""
    generator = torch.Generator().manual_seed(seed)
    paragraphs = []
    for number in range(count):
        words = [WORDS[3 + i] for i in torch.randint(0, 3, (8,), generator=generator)]
        place, colour = (int(torch.randint(0, high, (1,), generator=generator)) for high in (8, 3))
        words[place] = WORDS[colour]
        answer = {"text": words[place], "answer_start": len(" ".join([*words[:place], ""]))}
        question = {"id": f"{seed}.{number}", "question": "what ?", "answers": [answer]}
        paragraphs.append({"context": " ".join(words), "qas": [question]})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
