"""The numerics gate: no candidate's time counts before its results were compared with the dense product's.

Some algorithms of cuSPARSELt have returned wrong results (pytorch#155333). So each candidate runs several times on
poisoned outputs, on random data.
"""

import logging
from collections.abc import Iterable
from typing import TypeVar

import torch

from slope_megatron.ops.autotune.trials import ROWS_AT_ONCE, Candidate
from slope_megatron.sparsity.float8 import E4M3

logger = logging.getLogger(__name__)
OneCandidate = TypeVar("OneCandidate", bound=Candidate)
# Both products round the same fp32 sums, which differ in their order alone, to 16 bits: measured errors are near 3e-4.
MOST_RELATIVE_ERROR = 2e-3
# No single element may be off by more than a few roundings of itself plus a share of the typical element.
MOST_ELEMENT_ERROR = 2e-2
# Sums of e4m3 products err by 1.5e-3 over 9216 terms, on 2:4 and on dense tensor cores alike.
MOST_ERRORS_E4M3 = (8e-3, 5e-2)
GATE_REPEATS = 3


def wrong(candidate: Candidate) -> str | None:
    """What is wrong with a candidate's results; None: nothing."""
    trial = candidate.trial
    bounds = MOST_ERRORS_E4M3 if trial.key.dtype == E4M3 else (MOST_RELATIVE_ERROR, MOST_ELEMENT_ERROR)
    for _ in range(GATE_REPEATS):
        trial.poison()
        candidate()
        found, expected = trial.y_TR, trial.expected_TR
        typical = float(expected.norm(dtype=torch.float32)) / expected.numel() ** 0.5
        squares, worst = 0.0, 0.0
        for part, part_expected in zip(found.split(ROWS_AT_ONCE), expected.split(ROWS_AT_ONCE), strict=True):
            difference = (part.float() - part_expected.float()).abs()
            squares += float(difference.square().sum())
            worst = max(worst, float((difference / (part_expected.float().abs() + typical)).nan_to_num(1e9).max()))
        relative = squares**0.5 / (typical * expected.numel() ** 0.5)
        most_relative, most_element = bounds
        if not (relative <= most_relative and worst <= most_element):
            return f"relative error {relative:.1e}, worst element {worst:.1e}"
    return None


def passing(candidates: Iterable[OneCandidate]) -> list[OneCandidate]:
    """Those that pass; of the others a warning says why."""
    passed = []
    for candidate in candidates:
        problem = wrong(candidate)
        if problem:
            name = f"{candidate.trial.key}: {candidate.algorithm}"
            logger.warning("%s gives wrong results and is not used: %s", name, problem)
        else:
            passed.append(candidate)
    return passed
