"""What a measurement works on: a trial of one product, and the candidates for it. T tokens, R rows of the operand."""

from typing import Protocol

import torch

from slope_kernels import cusparselt
from slope_megatron.ops.choices import Algorithm, Key


class Trial(Protocol):
    """Random data of one product, room for its Y and the right answer."""

    key: Key
    y_TR: torch.Tensor
    expected_TR: torch.Tensor

    def dense_product(self) -> torch.Tensor:
        """The dense candidate."""

    def candidate(self, algorithm: cusparselt.Algorithm | None, tiles: int) -> "PlannedCandidate":
        """The sparse one with an algorithm of cuSPARSELt's; None: its default."""


class Candidate(Protocol):
    """A sparse product of a trial; a call enqueues it."""

    @property
    def trial(self) -> Trial: ...

    @property
    def tiles(self) -> int: ...

    @property
    def algorithm(self) -> Algorithm | None: ...

    def __call__(self) -> None: ...


class PlannedCandidate(Candidate, Protocol):
    """One of cuSPARSELt's."""

    @property
    def algorithm(self) -> cusparselt.Algorithm | None: ...

    @property
    def plan(self) -> cusparselt.Plan: ...
