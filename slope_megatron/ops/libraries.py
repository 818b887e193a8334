"""The libraries of 2:4 kernels. Adding one is a module `ops.operands.NAME` that is a `Library`, and its name in
`config.slope.LIBRARIES`, in whose order their candidates are measured."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from slope_megatron.config.slope import LIBRARIES

if TYPE_CHECKING:
    from slope_megatron.ops.autotune.trials import Candidate, Trial
    from slope_megatron.ops.choices import Choice, Key, Product
    from slope_megatron.ops.operands.protocol import SparseOperand, WeightPatterns
    from slope_megatron.sparsity.mvue_rng import MvueRng


class Library(Protocol):
    """What each module has. T tokens, N out, K in, C = K/2 kept per row."""

    # A dataclass; its ClassVar `library` is the module's name.
    Algorithm: Any
    # What it is, for the log line that names the backend.
    DESCRIPTION: str
    # The sparse operand of a weight's forward product or dgrad; values are set afterwards.
    Operand: "Callable[[WeightPatterns, Product], SparseOperand]"

    def version(self) -> str:
        """What the numbers of its algorithms depend on."""

    def unsupported(self) -> str | None:
        """Why this machine cannot run it; None: it can."""

    def unsupported_weight(self, values_NC: torch.Tensor, row_bits: torch.Tensor) -> str | None:
        """Why a weight cannot have operands of it here; None: it can."""

    def unsupported_wgrad(self, key: "Key", device: torch.device) -> str | None:
        """Why it cannot compute this wgrad of `full` mode here; None: it can."""

    def wgrad(
        self,
        dy_TN: torch.Tensor,
        x_TK: torch.Tensor,
        row_bits: torch.Tensor,
        rng: "MvueRng",
        total: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """P(dY)^T X at the kept positions, `[N, C]`."""

    def finalists(self, trial: "Trial", known: "Choice | None" = None) -> "list[Candidate]":
        """Its fastest candidates for a measurement that pass the numerics gate, fastest first.

        Args:
            known: a choice of its own, which alone is tried; None: all are.
        """

    def problem(self, key: "Key", tiles: int) -> Hashable:
        """What its registered ops find the measured algorithm of a product by."""


@functools.cache
def load() -> dict[str, Library]:
    """Every library, by name. By import at run time: the table of choices, which all of them import, reads theirs."""
    return {name: importlib.import_module(f"slope_megatron.ops.operands.{name}") for name in LIBRARIES}


def algorithm(fields: dict) -> Any:
    """The algorithm that `dataclasses.asdict` made `fields` of: each library's has fields of its own.

    Raises:
        ValueError: no library's algorithm has these fields.
    """
    for library in load().values():
        if {field.name for field in dataclasses.fields(library.Algorithm)} == set(fields):
            return library.Algorithm(**fields)
    raise ValueError(f"no library of 2:4 kernels has an algorithm with the fields {sorted(fields)}")
