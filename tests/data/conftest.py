"""A small corpus that looks a little like source code, and what prepare makes of it."""

import random

import hypothesis
import pytest
import torch.distributed as dist

# What a busy machine takes says nothing of the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

VOCABULARY = 400
DOCUMENTS = 80


def write_corpus(folder, documents=DOCUMENTS, seed=0):
    """`documents` files of words from a list of 60, with indents, tabs, CRLF and characters that are rare."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz_", k=chance.randint(2, 8))) for _ in range(60)]
    words += ["ξ", "\u2581", "<eod>", "😀"]
    for number in range(documents):
        ends = chance.choice(["\n", "\r\n", "\n\n"])
        lines = [chance.choice(["", "    ", "\t"]) + " ".join(chance.choices(words, k=8)) for _ in range(20)]
        path = folder / f"part{number % 3}" / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ends.join(lines).encode())
    return folder


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def prepared(corpus_folder, tmp_path_factory):
    """A prepared folder. Tests that damage it copy it first."""
    from slope_megatron.data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(str(corpus_folder), folder, vocab_size=VOCABULARY, valid_percent=10, test_percent=5)
    return folder


@pytest.fixture
def one_rank(tmp_path):
    """torch.distributed with this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
