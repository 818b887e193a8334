"""Numbers of a study's tables and charts: optima, spreads, lines through log loss against log compute, crossings."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable

from slope_megatron.study.rows import Row
from slope_megatron.study.runs import Run

Pair = tuple[Run, Row]


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one group, size and method, by learning rate."""

    group: str
    size: str
    method: str
    pairs: tuple[Pair, ...]

    @property
    def losses(self) -> dict[float, float | None]:
        """Mean over the seeds, by learning rate from the lowest on; None: a run diverged."""
        found: dict[float, list[float | None]] = {}
        for _, row in sorted(self.pairs, key=lambda pair: pair[1].lr):
            found.setdefault(row.lr, []).append(row.val_loss)
        return {lr: mean(own) for lr, own in found.items()}

    @property
    def best_lr(self) -> float | None:
        """Of those with the most seeds: a mean of fewer is another's luck. None: all runs diverged."""
        seeds = collections.Counter(row.lr for _, row in self.pairs)
        finite = {lr: loss for lr, loss in self.losses.items() if loss is not None}
        whole = [lr for lr in finite if seeds[lr] == max(seeds[other] for other in finite)]
        return min(whole, key=finite.__getitem__) if whole else None

    @property
    def loss(self) -> float | None:
        """At the best learning rate."""
        return None if self.best_lr is None else self.losses[self.best_lr]

    @property
    def seeds(self) -> int:
        """At the best learning rate."""
        return sum(row.lr == self.best_lr for _, row in self.pairs)

    @property
    def best_row(self) -> Row | None:
        """Of the first seed, for what all seeds share; it may have the name, size and method of another group's run."""
        return next((row for _, row in self.pairs if row.lr == self.best_lr), None)

    @property
    def optimum_at_edge(self) -> bool:
        """Whether the best of several learning rates is the lowest or highest one: the optimum may be beyond it."""
        rates = list(self.losses)
        return len(rates) > 1 and self.best_lr in (rates[0], rates[-1])


def mean(losses: Iterable[float | None]) -> float | None:
    finite = list(losses)
    return None if None in finite else statistics.fmean(loss for loss in finite if loss is not None)


def cells(pairs: Iterable[Pair]) -> list[Cell]:
    """In the order of the study."""
    found: dict[tuple[str, str, str], list[Pair]] = {}
    for run, row in pairs:
        found.setdefault((run.group, run.size, run.method), []).append((run, row))
    return [Cell(*key, tuple(own)) for key, own in found.items()]


@dataclasses.dataclass(frozen=True)
class Spread:
    """One method's losses over the seeds, at equal settings otherwise."""

    size: str
    method: str
    lr: float
    tokens: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample."""
        return statistics.stdev(self.losses)


def spreads(pairs: Iterable[Pair]) -> list[Spread]:
    """Of settings that were trained with two seeds or more, in whatever groups."""
    found: dict[tuple[str, str, float, int], dict[int, float]] = {}
    for run, row in pairs:
        if row.val_loss is not None:
            found.setdefault((run.size, run.method, row.lr, row.tokens), {})[row.seed] = row.val_loss
    return [Spread(*key, losses=tuple(own.values())) for key, own in found.items() if len(own) > 1]


@dataclasses.dataclass(frozen=True)
class Line:
    """log y = log_at_one + slope log x."""

    log_at_one: float
    slope: float

    def at(self, x: float) -> float:
        return math.exp(self.log_at_one + self.slope * math.log(x))

    def crossing(self, other: "Line") -> float | None:
        """The x at which two lines have one y; None: they are parallel, or it is beyond any number."""
        apart = other.slope - self.slope
        if abs(apart) < 1e-12:
            return None
        exponent = (self.log_at_one - other.log_at_one) / apart
        return math.exp(exponent) if abs(exponent) < 700 else None


def fit(points: Iterable[tuple[float, float]]) -> Line:
    """Least squares in logarithms, of two points or more with different x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    slope, intercept = statistics.linear_regression([x for x, _ in logs], [y for _, y in logs])
    return Line(intercept, slope)


@dataclasses.dataclass(frozen=True)
class Ladder:
    """One method's best losses over the sizes of a group.

    Args:
        points: (FLOPs as a dense model, loss), a size each; `parameters`: in the blocks of the size's dense model.
    """

    group: str
    method: str
    sizes: tuple[str, ...]
    points: tuple[tuple[float, float], ...]
    parameters: tuple[int, ...]

    def line(self, speedup: float = 1.0) -> Line:
        """Through loss against compute, or against time: the compute of a dense model that takes as long."""
        return fit((flops / speedup, loss) for flops, loss in self.points)

    def without(self, size: str) -> "Ladder":
        kept = [index for index, own in enumerate(self.sizes) if own != size]
        sizes, points = tuple(self.sizes[index] for index in kept), tuple(self.points[index] for index in kept)
        return Ladder(self.group, self.method, sizes, points, tuple(self.parameters[index] for index in kept))

    def parameters_at(self, flops: float) -> float:
        """Of a model that trains with so many FLOPs, by the line through the sizes."""
        costs = [cost for cost, _ in self.points]
        return fit(zip(costs, self.parameters, strict=True)).at(flops)


def crossings_without(dense: Ladder, one: Ladder, speedup: float) -> list[float | None]:
    """Parameters of the dense model at which two lines cross, with each size left out that leaves two to both."""
    found = []
    for size in one.sizes:
        theirs, ours = dense.without(size), one.without(size)
        if min(len(theirs.sizes), len(ours.sizes)) > 1:
            flops = ours.line(speedup).crossing(theirs.line())
            found.append(None if flops is None else theirs.parameters_at(flops))
    return found


def ladders(found: Iterable[Cell]) -> list[Ladder]:
    """Of methods with losses at two sizes of a group or more."""
    steps: dict[tuple[str, str], list[tuple[Cell, Row]]] = {}
    for cell in found:
        if cell.best_row is not None and cell.loss is not None:
            steps.setdefault((cell.group, cell.method), []).append((cell, cell.best_row))
    made = []
    for (group, method), own in steps.items():
        if len(own) > 1:
            sizes = tuple(cell.size for cell, _ in own)
            points = tuple((row.flops, float(cell.loss or 0.0)) for cell, row in own)
            made.append(Ladder(group, method, sizes, points, tuple(row.body_parameters for _, row in own)))
    return made
