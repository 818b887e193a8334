"""A document is in one split, and stays there."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slope_megatron.data.splits import SPLITS, assign_splits, published_splits, split_key

identities = st.lists(st.text(max_size=5), min_size=3, max_size=40)


def keys_of(names):
    return np.array([split_key(name) for name in names])


@given(identities)
def test_equal_identities_share_a_split(names):
    assume(len(set(names)) >= 3)
    splits = assign_splits(keys_of(names), 5, 2)
    assert len({(name, split) for name, split in zip(names, splits, strict=True)}) == len(set(names))
    assert set(splits) == set(range(len(SPLITS)))


def test_shares_are_as_asked_and_more_documents_move_none():
    names = [str(number) for number in range(4000)]
    splits = assign_splits(keys_of(names), 5, 2)
    # Binomial: 4 standard deviations of 0.0034 and 0.0022.
    assert abs((splits == 1).mean() - 0.05) < 0.014
    assert abs((splits == 2).mean() - 0.02) < 0.009
    assert (assign_splits(keys_of(names[:2000]), 5, 2) == splits[:2000]).all()


def test_order_does_not_matter():
    names = [str(number) for number in range(10)]
    splits = dict(zip(names, assign_splits(keys_of(names), 1, 1), strict=True))
    backwards = dict(zip(names[::-1], assign_splits(keys_of(names[::-1]), 1, 1), strict=True))
    assert splits == backwards


def test_a_split_that_is_not_asked_for_is_empty():
    names = [str(number) for number in range(100)]
    assert set(assign_splits(keys_of(names), 0, 0)) == {0}
    assert set(assign_splits(keys_of(names), 10, 0)) == {0, 1}
    assert set(assign_splits(keys_of(["one"]), 0, 0)) == {0}


@pytest.mark.parametrize(("names", "valid", "test"), [(["a"], 5, 2), (["a", "b"], 5, 2), (["a", "a", "a"], 5, 0)])
def test_too_few_documents_are_refused(names, valid, test):
    different = len(set(names))
    with pytest.raises(ValueError, match=rf"too few different documents \({different}\) for .*--test-percent 0"):
        assign_splits(keys_of(names), valid, test)


def test_keys_are_fixed_for_ever():
    # Prepared data is compared between machines and versions.
    assert split_key("os.py") == 0.943812766417913
    assert 0 <= split_key("") < 1
    assert split_key("\udce9") != split_key("e")


@pytest.mark.parametrize(("documents", "percent", "seed"), [(1001, 0.5, 2357), (40, 10, 1), (4000, 0.05, 2357)])
def test_published_splits_are_the_librarys(documents, percent, seed):
    import datasets

    whole = datasets.Dataset.from_dict({"number": list(range(documents))})
    parts = whole.train_test_split(test_size=percent / 100, seed=seed, shuffle=True)
    splits = published_splits(documents, percent, seed)
    assert set(np.flatnonzero(splits == 1)) == set(parts["test"]["number"])
    assert set(np.flatnonzero(splits == 0)) == set(parts["train"]["number"])


def test_published_splits_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match=r"--valid-percent 99.9 of 3 documents leaves a split empty"):
        published_splits(3, 99.9, 1)
