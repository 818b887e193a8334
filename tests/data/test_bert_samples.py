"""BERT's samples: pairs of one document, tokens asked for in their published shares, the same at every reading."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from slope_megatron.config import DataConfig
from slope_megatron.data.batches import MicroBatches
from slope_megatron.data.bert import bert_config
from slope_megatron.data.indexed import megatron_datasets
from slope_megatron.data.prepare import prepare
from slope_megatron.data.samples import build_datasets
from slope_megatron.data.sentences import split_sentences
from slope_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SEQ = 32


def write_stories(folder, documents=60):
    """Documents of ten sentences, each a run of successive words: what is hidden follows from its neighbours."""
    words = [chr(97 + one) + chr(97 + two) for one in range(8) for two in range(5)]
    folder.mkdir()
    for number in range(documents):
        lines = [
            " ".join(words[(number * 7 + line * 11 + place) % len(words)] for place in range(8)).capitalize() + "."
            for line in range(10)
        ]
        (folder / f"{number:03}.txt").write_text(" ".join(lines))
    return folder


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """A folder prepared for BERT."""
    root = tmp_path_factory.mktemp("stories")
    folder = write_stories(root / "texts")
    # A document that gives no pair, and one of nothing but white space.
    (folder / "title.txt").write_text("One sentence.")
    (folder / "white.txt").write_text(" \n ")
    prepare(str(folder), root / "data", kind="bert", vocab_size=160, valid_percent=10, test_percent=0)
    return root


def test_a_document_is_its_sentences(stories):
    tokenizer = load_tokenizer(stories / "data")
    texts = [path.read_text() for path in (stories / "texts").iterdir()]
    expected = Counter(
        tuple(tuple(tokenizer.encode(sentence)) for sentence in split_sentences(text)) for text in texts if text.strip()
    )
    found = Counter()
    for split in ("train", "valid"):
        dataset = megatron_datasets("indexed_dataset").IndexedDataset(str(stories / "data" / split))
        for first, last in itertools.pairwise(dataset.document_indices):
            found[tuple(tuple(dataset[number].tolist()) for number in range(first, last))] += 1
    assert found == expected


def samples_of(stories, cache, count=400, **changes):
    masking = dataclasses.replace(DataConfig(), **changes)
    return build_datasets(stories / "data", SEQ, count, 8, seed=3, cache=cache, masking=masking)[0]


def test_a_sample_is_a_pair_with_hidden_tokens(stories, tmp_path, one_rank):
    tokenizer = load_tokenizer(stories / "data")
    cls, sep, mask, pad = (tokenizer.mark(name) for name in ("cls", "sep", "mask", "pad"))
    dataset = megatron_datasets("indexed_dataset").IndexedDataset(str(stories / "data" / "train"))
    stream_text = " ".join(str(token) for number in range(len(dataset)) for token in dataset[number])
    asked = kept = hidden = real = 0
    following = []
    train = samples_of(stories, tmp_path / "cache")
    for number in range(400):
        sample = train[number]
        tokens, labels, types = (sample[name].numpy() for name in ("tokens", "labels", "types"))
        length = int(sample["padding_mask"].sum())
        assert (sample["padding_mask"][:length] == 1).all() and (tokens[length:] == pad).all()
        chosen = sample["loss_mask"].numpy() == 1
        assert (labels[~chosen] == 0).all() and not chosen[length:].any()
        original = np.where(chosen, labels, tokens)
        ends = np.flatnonzero(original == sep)
        assert original[0] == cls and len(ends) == 2 and ends[1] == length - 1
        assert (types == ((np.arange(SEQ) > ends[0]) & (np.arange(SEQ) < length))).all()
        assert not chosen[[0, *ends]].any()
        first, second = original[1 : ends[0]], original[ends[0] + 1 : ends[1]]
        for part in (first, second):
            assert " ".join(map(str, part)) in stream_text, "both parts are runs of the text"
        following.append(int(sample["is_next"]))
        asked += chosen.sum()
        hidden += (tokens[chosen] == mask).sum()
        kept += (tokens[chosen] == labels[chosen]).sum()
        real += length - 3
    # Of about 1,500 chosen tokens: 5 standard deviations of 0.8 and 0.1 are 0.05 and 0.04; of 400 pairs, 0.125.
    assert abs(hidden / asked - 0.8) < 0.05
    assert abs(kept / asked - 0.1) < 0.05
    # Rounded down in each sample, and to none in the shortest.
    assert 0.11 < asked / (real + 3 * 400) < 0.15
    assert abs(np.mean(following) - 0.5) < 0.125


def test_changed_places_are_what_is_next_says(stories, tmp_path, one_rank):
    """With short sentences and nothing cut, first + second (or second + first) stand together in the text."""
    train = samples_of(stories, tmp_path / "cache", short_sequences=0.0)
    tokenizer = load_tokenizer(stories / "data")
    dataset = megatron_datasets("indexed_dataset").IndexedDataset(str(stories / "data" / "train"))
    text = " ".join(str(token) for number in range(len(dataset)) for token in dataset[number])
    told = Counter()
    for number in range(400):
        sample = train[number]
        tokens = torch.where(sample["loss_mask"] == 1, sample["labels"], sample["tokens"])
        ends = (tokens == tokenizer.mark("sep")).nonzero().flatten().tolist()
        parts = [tokens[1 : ends[0]].tolist(), tokens[ends[0] + 1 : ends[1]].tolist()]
        inside = [" ".join(map(str, a + b)) in text for a, b in (parts, parts[::-1])]
        if inside[0] != inside[1]:
            told[int(sample["is_next"]), inside[0]] += 1
    assert told[1, True] > 20 and told[0, False] > 20
    assert not told[1, False] and not told[0, True]


def test_samples_follow_from_their_number(stories, tmp_path, one_rank):
    once, again = (samples_of(stories, tmp_path / name) for name in ("one", "two"))
    for number in (399, 0, 7):
        assert all(torch.equal(once[number][key], again[number][key]) for key in once[number])
    batches = [list(MicroBatches(samples, 8, 4, 0, 1).step(5)) for samples in (once, again)]
    assert [batch["tokens"].tolist() for batch in batches[0]] == [batch["tokens"].tolist() for batch in batches[1]]
    assert {key: tuple(value.shape) for key, value in batches[0][0].items()} == {
        **dict.fromkeys(("tokens", "labels", "loss_mask", "padding_mask", "types"), (4, SEQ)),
        "is_next": (4,),
    }
    other = samples_of(stories, tmp_path / "one", mlm_probability=0.4)
    assert other[0]["loss_mask"].sum() > once[0]["loss_mask"].sum()


def test_a_sentencepiece_vocabulary_is_refused(tmp_path):
    tokenizer = Tokenizer(train_tokenizer(["one sentence and another\n" * 20], 300))
    with pytest.raises(ValueError, match="the tokenizer is a SentencePiece model: BERT needs a WordPiece vocabulary"):
        bert_config(tokenizer, SEQ, 1, DataConfig())


def test_text_without_pairs_is_refused(tmp_path, one_rank):
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "one sentence {number}"}}\n' for number in range(40)))
    prepare(str(tmp_path / "c.jsonl"), tmp_path / "data", kind="bert", vocab_size=160)
    with pytest.raises(ValueError, match=r"the train split of .* has no document of two sentences: BERT's pairs need"):
        build_datasets(tmp_path / "data", SEQ, 8, 0, seed=1)
    with pytest.raises(ValueError, match="--seq-length is 6: BERT's pairs need at least 8"):
        build_datasets(tmp_path / "data", 6, 8, 0, seed=1)
