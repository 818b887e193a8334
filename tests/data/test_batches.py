"""What a step consumes depends on the step alone, not on how many replicas share it or where a run began."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slope_megatron.data.batches import MicroBatches, ValidationBatches
from slope_megatron.data.samples import build_datasets

SEQ = 4


class Numbers:
    """A dataset whose sample i consists of i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        assert 0 <= number < self.length
        whole = torch.full((SEQ,), number)
        return {"tokens": whole, "labels": whole + 1, "loss_mask": torch.ones(SEQ), "position_ids": torch.arange(SEQ)}


def numbers(batches):
    return [number for batch in batches for number in batch["tokens"][:, 0].tolist()]


def of_all_ranks(dataset, global_batch, micro_batch, ranks, step):
    cut = [MicroBatches(dataset, global_batch, micro_batch, rank, ranks) for rank in range(ranks)]
    return [numbers(batches.step(step)) for batches in cut]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_a_step_is_the_same_samples_however_it_is_cut(micro_batch, ranks, count, step):
    size = micro_batch * ranks * count
    parts = of_all_ranks(Numbers(6 * size), size, micro_batch, ranks, step)
    # Each rank the same number, together the step's window, nothing twice.
    assert {len(part) for part in parts} == {size // ranks}
    assert sorted(itertools.chain(*parts)) == list(range(step * size, (step + 1) * size))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_documented_order(ranks):
    parts = of_all_ranks(Numbers(64), 8, 2, ranks, 3)
    expected = {
        1: [[24, 25, 26, 27, 28, 29, 30, 31]],
        2: [[24, 25, 28, 29], [26, 27, 30, 31]],
        4: [[24, 25], [26, 27], [28, 29], [30, 31]],
    }
    assert parts == expected[ranks]


def test_a_batch_is_tensors_on_the_cpu(prepared, tmp_path, one_rank):
    train, valid = build_datasets(prepared, SEQ, 16, 3, seed=1, cache=tmp_path / "cache")
    for batches in (MicroBatches(train, 4, 2, 0, 1).step(0), ValidationBatches(valid, 3, 2, 0, 1)):
        batches = list(batches)
        assert len(batches) == 2
        for batch in batches:
            assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
                "tokens": ((2, SEQ), torch.int64),
                "labels": ((2, SEQ), torch.int64),
                "loss_mask": ((2, SEQ), torch.float32),
                "position_ids": ((2, SEQ), torch.int64),
            }


def test_resuming_at_a_step_gives_the_batches_of_that_step(prepared, tmp_path, one_rank):
    def run(first, last):
        train, _ = build_datasets(prepared, SEQ, 40, 3, seed=1, cache=tmp_path / "cache")
        batches = MicroBatches(train, 4, 2, 1, 2)
        return [batch for step in range(first, last) for batch in batches.step(step)]

    through, resumed = run(0, 10), run(6, 10)
    for one, other in zip(through[6:], resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_steps_beyond_the_dataset_are_refused():
    batches = MicroBatches(Numbers(16), 8, 2, 0, 1)
    list(batches.step(1))
    with pytest.raises(ValueError, match=r"step 2 needs samples up to 24 and the dataset was built with 16: build it"):
        list(batches.step(2))


def test_a_global_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"--global-batch-size is 6: it must be a multiple of .* = 2 x 2 = 4"):
        MicroBatches(Numbers(16), 6, 2, 0, 2)


@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 4))
def test_validation_is_the_same_samples_however_it_is_cut(samples, micro_batch, ranks):
    parts = [list(ValidationBatches(Numbers(20), samples, micro_batch, rank, ranks)) for rank in range(ranks)]
    # Collectives: as many micro-batches on each rank.
    assert len({len(part) for part in parts}) == 1
    batches = list(itertools.chain(*parts))
    counted = [
        (int(tokens[0]), float(mask.sum()))
        for batch in batches
        for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True)
    ]
    assert sorted(number for number, weight in counted if weight) == list(range(samples))
    assert sum(weight for _, weight in counted) == samples * SEQ


def test_validation_can_be_repeated():
    batches = ValidationBatches(Numbers(9), 9, 2, 1, 2)
    assert numbers(batches) == numbers(batches)


@pytest.mark.parametrize("samples", [0, 10])
def test_validation_samples_that_are_not_there_are_refused(samples):
    with pytest.raises(ValueError, match=f"--eval-samples is {samples} and the validation dataset was built with 9"):
        ValidationBatches(Numbers(9), samples, 1, 0, 1)
