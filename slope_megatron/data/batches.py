"""Prepared data as batches. Where a run stands in the data is a function of its step alone, so resuming is exact.

Samples are Megatron's. For GPT: the split's documents, shuffled, laid end to end, cut into `seq_length + 1` tokens that
overlap by one; the cuts are shuffled again, and after one epoch comes the next. For BERT: see `data.bert`.

Legend: b micro-batch, s sequence.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch

from slope_megatron.config import DataConfig

Batch = dict[str, torch.Tensor]
Dataset = Sequence[Mapping[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """Training batches of one data-parallel rank.

    With G the global batch, b the micro-batch, R the ranks: sample i of micro-batch m of rank r in a step is number

        step * G + (m * R + r) * b + i

    so that a step consumes samples step * G to (step + 1) * G - 1 whatever R and b are.

    Raises:
        ValueError: the global batch is no multiple of micro-batch x ranks.
    """

    dataset: Dataset
    global_batch_size: int
    micro_batch_size: int
    rank: int
    size: int

    def __post_init__(self):
        assert 0 <= self.rank < self.size
        assert self.count

    @functools.cached_property
    def count(self) -> int:
        """Micro-batches of a step on this rank."""
        sizes = DataConfig(global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size)
        return sizes.micro_batches(self.size)

    def sample_numbers(self, step: int, micro_batch: int) -> range:
        """The samples of one micro-batch of this rank."""
        first = step * self.global_batch_size + (micro_batch * self.size + self.rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def step(self, step: int) -> Iterator[Batch]:
        """Yield the `count` micro-batches of this rank for the `step`-th update, counted from 0.

        Each holds what the samples hold, stacked: for GPT tokens, labels, position_ids [b, s] int64 and loss_mask
        [b, s] fp32, on the CPU.

        Raises:
            ValueError: the dataset was built for fewer steps.
        """
        end = (step + 1) * self.global_batch_size
        if end > len(self.dataset):
            raise ValueError(
                f"step {step} needs samples up to {end:,} and the dataset was built with {len(self.dataset):,}: "
                f"build it with steps x global batch ({self.global_batch_size}) samples"
            )
        for micro_batch in range(self.count):
            yield _stack([self.dataset[number] for number in self.sample_numbers(step, micro_batch)])


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """The first `samples` of the validation split, the same ones each time, cut over the data-parallel ranks.

    Every rank gets the same number of micro-batches, as collectives need; where the samples run out, sample 0 stands in
    with a loss mask of zeros. So sum(loss * mask) / sum(mask) over all ranks depends neither on R nor on b.

    Raises:
        ValueError: the dataset was built with fewer samples.
    """

    dataset: Dataset
    samples: int
    micro_batch_size: int
    rank: int
    size: int

    def __post_init__(self):
        assert 0 <= self.rank < self.size
        if not 0 < self.samples <= len(self.dataset):
            raise ValueError(
                f"--eval-samples is {self.samples} and the validation dataset was built with {len(self.dataset)}: "
                "it must be at least 1 and not more than that; build it with as many"
            )

    @property
    def count(self) -> int:
        return -(-self.samples // (self.micro_batch_size * self.size))

    def __iter__(self) -> Iterator[Batch]:
        """Yield `count` micro-batches as MicroBatches yields them; from the start each time."""
        for micro_batch in range(self.count):
            first = (micro_batch * self.size + self.rank) * self.micro_batch_size
            yield _stack([self._sample(number) for number in range(first, first + self.micro_batch_size)])

    def _sample(self, number: int) -> Mapping[str, torch.Tensor]:
        if number < self.samples:
            return self.dataset[number]
        filler = self.dataset[0]
        return {**filler, "loss_mask": torch.zeros_like(filler["loss_mask"])}


def _stack(samples: list[Mapping[str, torch.Tensor]]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
