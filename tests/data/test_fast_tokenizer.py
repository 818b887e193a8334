"""Tokenizers of the `tokenizers` library: as their files say, and what a document says never ends it."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_megatron.data.fast_tokenizer import FastTokenizer, train_bpe, train_wordpiece
from slope_megatron.data.indexed import token_dtype
from slope_megatron.data.tokenizer import load_tokenizer

TEXT = "def function(argument):\n    return argument + 1\n\n\tclass Name: ξ <|endoftext|> [SEP] Été\r\n" * 40
BPE = train_bpe([TEXT], 320)
WORDPIECE = train_wordpiece([TEXT], 120, True)


@given(st.one_of(st.text(), st.lists(st.sampled_from(["<|endoftext|>", " ", "\n", "return", "\0"])).map("".join)))
def test_byte_level_bpe_loses_nothing(text):
    ids = BPE.encode(text)
    assert BPE.decode([*ids, BPE.eod]) == text
    assert BPE.eod not in ids
    assert BPE.encode_all([text, ""]) == [ids, []]
    assert all(0 <= token < BPE.vocab_size for token in ids)


def test_wordpiece_is_berts():
    marks = {name: WORDPIECE.mark(name) for name in ("pad", "cls", "sep", "mask")}
    assert marks == {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    ids = WORDPIECE.encode("[SEP] Return ÉTÉ [CLS]")
    assert not set(marks.values()) & set(ids)
    assert WORDPIECE.decode(ids) == "[ sep ] return ete [ cls ]"
    with pytest.raises(ValueError, match=r"has no \[PAD\]: BERT needs a WordPiece vocabulary"):
        BPE.mark("pad")


CODE = """
from slope_megatron.data.fast_tokenizer import train_bpe, train_wordpiece
trained = (train_bpe([{text!r}], 320), train_wordpiece([{text!r}], 120, True))
print(hash("a") and [tokenizer.unique_identifiers["sha256"] for tokenizer in trained])
"""


def test_training_gives_the_same_tokenizer_in_another_process():
    """The library's hash tables have another seed in each process."""
    told = subprocess.run([sys.executable, "-c", CODE.format(text=TEXT)], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str([each.unique_identifiers["sha256"] for each in (BPE, WORDPIECE)])


def test_files_of_published_models_are_read(tmp_path):
    """The forms that GPT-2, BERT and LLaMA-3 come in give the tokenizer that they were written from."""
    library = BPE._tokenizer
    text = "return argument + 1 <|endoftext|> ξ"
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    library.model.save(str(gpt2))
    assert sorted(path.name for path in gpt2.iterdir()) == ["merges.txt", "vocab.json"]
    assert load_tokenizer(gpt2).encode(text) == BPE.encode(text)
    assert load_tokenizer(gpt2).eod == BPE.eod

    bert = tmp_path / "bert"
    bert.mkdir()
    WORDPIECE._tokenizer.model.save(str(bert))
    assert load_tokenizer(bert / "vocab.txt").encode(text) == WORDPIECE.encode(text)
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(bert).encode("Return") != load_tokenizer(bert).encode("return")

    llama = tmp_path / "llama"
    llama.mkdir()
    end = "<|end|>"
    content = json.loads(BPE.files["tokenizer.json"])
    number = library.get_vocab_size()
    content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": end})
    # As LLaMA-3's: a post-processor that puts a mark in front, and an end that only the configuration names.
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (llama / "tokenizer.json").write_text(json.dumps(content))
    (llama / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}))
    loaded = load_tokenizer(llama)
    assert loaded.encode(text) == BPE.encode(text)
    assert (loaded.eod_text, loaded.eod) == (end, number)
    assert load_tokenizer(llama, eod="<|endoftext|>").eod == BPE.eod


def test_written_files_are_read_again(tmp_path):
    for tokenizer in (BPE, WORDPIECE):
        for name, content in tokenizer.files.items():
            (tmp_path / name).write_bytes(content)
        again = load_tokenizer(tmp_path)
        assert again.files == tokenizer.files
        assert again.unique_identifiers == load_tokenizer(tmp_path).unique_identifiers
        assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_ids_may_have_holes():
    content = json.loads(BPE.files["tokenizer.json"])
    content["added_tokens"].append({**content["added_tokens"][0], "id": 70_000, "content": "<far>"})
    loaded = FastTokenizer(json.dumps(content))
    assert loaded.vocab_size == loaded._vocabulary["<far>"] + 1 >= len(loaded._vocabulary)


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "uint16"), (65_499, "uint16"), (65_500, "int32"), (128_256, "int32")]
)
def test_the_token_type_holds_every_token(size, dtype):
    from slope_megatron.data.indexed import megatron_datasets

    assert token_dtype(size).name == dtype == megatron_datasets("indexed_dataset").DType.optimal_dtype(size).__name__


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer: it must hold one of tokenizer.json, tokenizer.model"):
        load_tokenizer(tmp_path)
    for name, content, message in (
        ("tokenizer.json", b"{", r"tokenizer.json: this is no tokenizer.json \("),
        ("tokenizer.json", b"\xff", "tokenizer.json is not UTF-8"),
        ("vocab.json", b"{}", "merges.txt is missing: GPT-2's tokenizer is the two files together"),
        ("vocab.txt", b"a\nb\n", r"a BERT vocabulary must have \[PAD\]"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
        (tmp_path / name).unlink()
    # Nor one that a text spells.
    ordinary = BPE._tokenizer.id_to_token(300)
    with pytest.raises(ValueError, match=f"a text can spell {ordinary!r}, which ends a document"):
        FastTokenizer(BPE.files["tokenizer.json"].decode(), ordinary)
    with pytest.raises(ValueError, match="--eod is '<no>': the tokenizer has no such token"):
        FastTokenizer(BPE.files["tokenizer.json"].decode(), "<no>")
    with pytest.raises(ValueError, match=r"--vocab-size is 200: bytes and .* alone take 257"):
        train_bpe([TEXT], 200)
    with pytest.raises(ValueError, match=r"--vocab-size is 20: marks and single .* give --vocab-size \d+ or more"):
        train_wordpiece([TEXT], 20, True)
