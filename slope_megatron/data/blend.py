"""Several datasets as one, in fixed shares, without an index: which sample is number i follows from i alone."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate


class Blend:
    """Sample i of a mixture: of the first n samples, source k gives its share of n but for less than one a source.

    The first source with share w takes number i where floor((i + 1) w) > floor(i w), as its sample floor(i w); the
    others share the rest in the same way. Exact, in whole numbers.
    """

    def __init__(self, datasets: Sequence, weights: Sequence[float], length: int):
        """`datasets` must hold `samples_needed(weights, length)` samples each."""
        self.datasets = list(datasets)
        self.shares = cascade(weights)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Mapping:
        source, index = index_of(self.shares, number)
        return self.datasets[source][index]


def cascade(weights: Sequence[float]) -> list[Fraction]:
    """Of each source its share of what the sources before it leave; the last one's is 1."""
    exact = [as_fraction(weight) for weight in weights]
    left = list(accumulate(reversed(exact)))[::-1]
    return [weight / rest for weight, rest in zip(exact, left, strict=True)]


def as_fraction(weight: float) -> Fraction:
    """0.3 as 3/10, which is what was meant; a weight too small for such a denominator as it is."""
    near = Fraction(weight).limit_denominator(10**6)
    return near if abs(near - Fraction(weight)) * 1000 <= weight else Fraction(weight)


def index_of(shares: Sequence[Fraction], number: int) -> tuple[int, int]:
    """(source, its sample) of sample `number`."""
    for source, share in enumerate(shares):
        before = number * share.numerator // share.denominator
        if (number + 1) * share.numerator // share.denominator > before:
            return source, before
        number -= before
    raise AssertionError("the last share is 1")


def samples_needed(weights: Sequence[float], length: int) -> list[int]:
    """How many samples each source gives to the first `length`."""
    counts = []
    for share in cascade(weights):
        counts.append(length * share.numerator // share.denominator)
        length -= counts[-1]
    return counts
