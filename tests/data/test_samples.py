"""Samples are the prepared documents, shuffled and laid end to end; every rank sees the same ones."""

import pickle
import shutil

import numpy as np
import pytest

from helpers.payload import Payload
from slope_megatron.data.indexed import megatron_datasets
from slope_megatron.data.manifest import load_manifest
from slope_megatron.data.samples import build_datasets

SEQ = 32


def one_epoch(folder, split):
    """Whole samples that one pass over the split gives."""
    return (load_manifest(folder)["splits"][split]["tokens"] - 1) // SEQ


def test_samples_are_the_encoded_documents(prepared, tmp_path, one_rank):
    count = one_epoch(prepared, "train")
    train, _ = build_datasets(prepared, SEQ, count, 1, seed=1, cache=tmp_path / "cache")
    assert len(train) == count
    documents = megatron_datasets("indexed_dataset").IndexedDataset(str(prepared / "train"))
    # Megatron's own document order, which must name every document once; the rest is recomputed here.
    order = np.asarray(train.document_index)
    assert sorted(order) == list(range(len(documents)))
    stream = np.concatenate([documents[int(number)] for number in order]).astype(np.int64)
    places = np.asarray(train.shuffle_index)
    assert sorted(places) == list(range(count))
    for number in range(count):
        start = int(places[number]) * SEQ
        sample = train[number]
        assert (sample["tokens"].numpy() == stream[start : start + SEQ]).all()
        assert (sample["labels"].numpy() == stream[start + 1 : start + SEQ + 1]).all()
        assert (sample["loss_mask"] == 1).all()
        assert (sample["position_ids"].numpy() == np.arange(SEQ)).all()


@pytest.mark.parametrize("epochs", [1.2, 3.7])
def test_more_than_an_epoch(prepared, tmp_path, one_rank, epochs):
    train_samples = int(epochs * one_epoch(prepared, "train"))
    valid_samples = int(epochs * one_epoch(prepared, "valid"))
    train, valid = build_datasets(prepared, SEQ, train_samples, valid_samples, seed=1, cache=tmp_path / "cache")
    assert len(train) >= train_samples and len(valid) >= valid_samples
    assert train[train_samples - 1]["tokens"].shape == (SEQ,)


def test_the_longest_sample_a_split_allows(prepared, tmp_path, one_rank):
    longest = load_manifest(prepared)["splits"]["valid"]["tokens"] - 1
    _, valid = build_datasets(prepared, longest, 0, 5, seed=1, cache=tmp_path / "cache")
    assert len(valid) >= 5
    assert valid[4]["tokens"].shape == (longest,)
    with pytest.raises(ValueError, match=rf"the valid split of .* needs {longest + 2}; take a shorter --seq-length"):
        build_datasets(prepared, longest + 1, 0, 5, seed=1, cache=tmp_path / "cache")


def test_the_seed_decides_the_order(prepared, tmp_path, one_rank):
    def first(seed):
        return build_datasets(prepared, SEQ, 50, 10, seed=seed, cache=tmp_path / str(seed))[0][0]["tokens"].tolist()

    assert first(1) == first(1) != first(2)


def test_the_index_is_written_once_into_the_data_folder(prepared, tmp_path, one_rank):
    folder = shutil.copytree(prepared, tmp_path / "data")
    build_datasets(folder, SEQ, 50, 10, seed=1)
    (place,) = (folder / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    # Four files a split and their checksums: Megatron found all that was written, and added nothing.
    assert len(before) == 9
    build_datasets(folder, SEQ, 50, 10, seed=1)
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before
    build_datasets(folder, SEQ, 60, 10, seed=1)
    assert len(list((folder / "cache").iterdir())) == 2
    load_manifest(folder)


def test_it_works_without_torch_distributed(prepared, tmp_path):
    train, valid = build_datasets(prepared, SEQ, 5, 0, seed=1, cache=tmp_path / "cache")
    assert len(train) >= 5 and valid is None


def test_bad_requests_are_refused(prepared, tmp_path, one_rank):
    with pytest.raises(ValueError, match=r"data folder .* does not exist"):
        build_datasets(tmp_path / "none", SEQ, 5, 5, seed=1)
    with pytest.raises(ValueError, match="-1 train samples were asked for: it must be 0"):
        build_datasets(prepared, SEQ, -1, 5, seed=1)
    with pytest.raises(ValueError, match=r"the train split of .* has \d+ tokens: one sample of --seq-length 1000000"):
        build_datasets(prepared, 1_000_000, 5, 5, seed=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"index cannot be written to .*file .*: give a cache folder you may write to"):
        build_datasets(prepared, SEQ, 5, 5, seed=1, cache=tmp_path / "file")


def samples_on_rank(folder, cache):
    train, valid = build_datasets(folder, SEQ, 50, 10, seed=1, cache=cache)
    return [train[number]["tokens"].tolist() for number in range(50)] + [valid[0]["tokens"].tolist()]


def refusal_on_rank(folder, cache):
    with pytest.raises(ValueError) as refusal:
        build_datasets(folder, SEQ, 50, 10, seed=1, cache=cache)
    return str(refusal.value)


def test_all_ranks_see_the_same_samples_and_the_same_errors(prepared, tmp_path, ranks, one_rank):
    first, second = ranks.run(samples_on_rank, str(prepared), str(tmp_path / "cache"), world=2)
    assert first == second == samples_on_rank(prepared, tmp_path / "alone")
    (tmp_path / "file").write_text("")
    first, second = ranks.run(refusal_on_rank, str(prepared), str(tmp_path / "file"), world=2)
    assert first == second and "give a cache folder you may write to" in first


def test_a_folder_that_other_nodes_do_not_see(prepared, tmp_path, monkeypatch, one_rank):
    from slope_megatron.data import samples

    monkeypatch.setattr(samples, "_write_index", lambda *_: None)
    with pytest.raises(ValueError, match=r"rank 0 does not see the index folder .*: put the data on a file system"):
        build_datasets(prepared, SEQ, 5, 5, seed=1, cache=tmp_path / "cache")


def test_a_damaged_index_is_built_anew(prepared, tmp_path, one_rank, caplog):
    """A turned bit in it is another order of samples, and nobody would see it."""

    def samples():
        train, _ = build_datasets(prepared, SEQ, 50, 10, seed=1, cache=tmp_path / "cache")
        return [train[number]["tokens"].tolist() for number in range(50)]

    expected = samples()
    (place,) = (tmp_path / "cache").iterdir()
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    (victim,) = place.glob("*train-shuffle_index.npy")
    content = bytearray(before[victim.name])
    content[-8] ^= 1
    victim.write_bytes(content)
    assert samples() == expected
    assert (
        f"the data's index {place} is damaged (its file {victim.name} has another checksum): it is built" in caplog.text
    )
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [place.name], "nothing is left beside it"


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", ["pickle", "npz", "objects"])
def test_an_index_is_never_unpickled(prepared, tmp_path, one_rank, caplog, kind, sealed):
    """Megatron reads arrays with `allow_pickle`; whoever can write a cache folder would run code in every run."""
    from slope_megatron.storage import sums

    build_datasets(prepared, SEQ, 50, 10, seed=1, cache=tmp_path / "cache")
    (place,) = (tmp_path / "cache").iterdir()
    (victim,) = place.glob("*train-document_index.npy")
    payload = Payload(tmp_path / "ran")
    with open(victim, "wb") as stream:
        if kind == "pickle":
            pickle.dump(payload, stream)
        elif kind == "npz":
            np.savez(stream, a=np.array([payload], dtype=object))
        else:
            np.save(stream, np.array([payload], dtype=object))
    (place / sums.FOLDER).unlink()
    if sealed:
        sums.write_manifest(place)
    train, _ = build_datasets(prepared, SEQ, 50, 10, seed=1, cache=tmp_path / "cache")
    assert train[49]["tokens"].shape == (SEQ,) and not (tmp_path / "ran").exists()
    assert f"is damaged (its file {victim.name} is no array): it is built anew" in caplog.text


def test_an_index_of_before_is_used_and_the_log_says_that_it_has_no_sums(prepared, tmp_path, one_rank, caplog):
    from slope_megatron.storage import sums

    build_datasets(prepared, SEQ, 50, 10, seed=1, cache=tmp_path / "cache")
    (place,) = (tmp_path / "cache").iterdir()
    (place / sums.FOLDER).unlink()
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    with caplog.at_level("INFO"):
        build_datasets(prepared, SEQ, 50, 10, seed=1, cache=tmp_path / "cache")
    assert f"{place} carries no checksums" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before
