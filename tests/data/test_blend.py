"""A blend draws from its sources in their shares, each source's samples in order, whole numbers throughout."""

import pytest
from conftest import VOCABULARY, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from slope_megatron.data.blend import Blend, samples_needed

WEIGHTS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4)


@given(WEIGHTS, st.integers(1, 300))
def test_shares_hold_at_every_length(weights, length):
    blend = Blend([[(source, place) for place in range(length)] for source in range(len(weights))], weights, length)
    taken = [0] * len(weights)
    for number in range(length):
        source, place = blend[number]
        assert place == taken[source], "each source's samples come in order, none twice"
        taken[source] += 1
        for weight, count in zip(weights, taken, strict=True):
            # Each step of the cascade is off by less than one.
            assert abs(count - (number + 1) * weight / sum(weights)) < len(weights) + 1e-2
    assert taken == samples_needed(weights, length)


@pytest.mark.parametrize("weights", [[1e-7, 3e-7], [6e-7, 18e-7], [0.25, 0.75], [1e9, 3e9]])
def test_only_the_ratio_of_the_weights_counts(weights):
    assert samples_needed(weights, 1000) == [250, 750]


def test_a_source_of_a_tiny_share_takes_part():
    assert samples_needed([1.0, 1e-9], 2 * 10**9) == [2 * 10**9 - 2, 2]


@pytest.mark.parametrize("weights", [[0.75, 0.25], None])
def test_two_prepared_sources_are_blended(tmp_path, one_rank, weights):
    from slope_megatron.data.prepare import prepare
    from slope_megatron.data.samples import build_datasets

    # Sources that tell themselves apart: upper case has tokens of its own.
    one = write_corpus(tmp_path / "one", seed=1)
    two = tmp_path / "two.txt"
    two.write_text("UPPER CASE " * 400)
    (tmp_path / "many").mkdir()
    for number in range(20):
        (tmp_path / "many" / f"{number}.txt").write_text(f"{number} " + "UPPER CASE " * 100)
    specs = [str(one), str(tmp_path / "many")]
    if weights:
        specs = [f"{spec}={weight}" for spec, weight in zip(specs, weights, strict=True)]
    manifest = prepare(specs, tmp_path / "data", vocab_size=VOCABULARY, workers=2)
    assert sorted(path.name for path in (tmp_path / "data").glob("train*.bin")) == ["train_0.bin", "train_1.bin"]
    sources = manifest["sources"]
    for key in ("documents", "tokens", "bytes"):
        assert manifest["splits"]["train"][key] == sum(part["splits"]["train"][key] for part in sources)
    train, valid = build_datasets(tmp_path / "data", 16, 400, 40, seed=1, cache=tmp_path / "cache")
    assert (len(train), len(valid)) == (400, 40)
    # The first source has no capital letters but for its own words' none.
    from slope_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tmp_path / "data")
    from_second = sum("UPPER" in tokenizer.decode(train[number]["tokens"]) for number in range(400))
    tokens = [part["splits"]["train"]["tokens"] for part in sources]
    share = 0.25 if weights else tokens[1] / sum(tokens)
    assert abs(from_second - 400 * share) <= 1
