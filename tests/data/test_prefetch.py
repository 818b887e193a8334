"""Batches read one step ahead are those of the step."""

import threading

import pytest

from slope_megatron.data.prefetch import Prefetch


class Batches:
    """Stands for `MicroBatches`: notes who reads what."""

    def __init__(self):
        self.read: list[tuple[int, str]] = []

    def step(self, step: int):
        self.read.append((step, threading.current_thread().name))
        if step == 5:
            raise ValueError("step 5 is not there")
        yield from ({"tokens": step, "number": number} for number in range(2))


def test_each_step_gets_its_own_and_the_next_is_read_meanwhile():
    source = Batches()
    batches = Prefetch(source, 4, pin=False)
    for step in (0, 1, 3):
        assert batches.step(step) == [{"tokens": step, "number": 0}, {"tokens": step, "number": 1}]
    batches.close()
    # Step 2 was read ahead and not wanted; nothing is read past the last.
    assert [step for step, _ in source.read] == [0, 1, 2, 3]
    assert all(name.startswith("prefetch") for _, name in source.read)


def test_what_reading_raises_comes_with_the_step_that_needs_it():
    batches = Prefetch(Batches(), 10, pin=False)
    batches.step(4)
    with pytest.raises(ValueError, match="step 5 is not there"):
        batches.step(5)
    batches.close()


def test_closing_does_not_wait_for_what_nobody_reads():
    batches = Prefetch(Batches(), 10, pin=False)
    batches.step(0)
    batches.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
