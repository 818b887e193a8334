"""CUTLASS's candidates for one product: every kernel, then the walks of the fastest ones.

They meet the same numerics gate and the same contest as cuSPARSELt's algorithms (`measure`).
"""

import functools
import logging

import torch

from slope_kernels import cutlass, load_cuda
from slope_megatron.ops import layout, timing
from slope_megatron.ops.cutlass_operand import row_metadata

logger = logging.getLogger(__name__)
# (swizzle, raster): the default walk first; wider swizzles never won.
WALKS = ((1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2))
KERNELS_TO_WALK = 2
FINALISTS = 2


class Candidate:
    """A sparse product of a trial by one kernel and one walk."""

    tiles = 1

    def __init__(self, trial, metadata: torch.Tensor, algorithm: cutlass.Algorithm):
        key = trial.key
        self.trial, self.metadata, self.algorithm = trial, metadata, algorithm
        self.values_RC = layout.values_of(trial.operand(1), key.rows, key.columns, 1, key.dtype)[0]

    def __call__(self) -> None:
        cutlass.run(self.algorithm, self.values_RC, self.metadata, self.trial.x_TS, self.trial.y_TR)


@functools.cache
def kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels that compile here; why all or one do not is said once, with the compiler's last lines.

    Each with both epilogues at once: the one that adds is wanted when adapters join, and a run would wait for it then.
    """
    reason = cutlass.unsupported()
    if reason:
        logger.info("our own kernels are not among the candidates: %s", reason)
        return ()
    sources = {
        cutlass.source(kernel, dtype, adds): name for name, kernel in cutlass.KERNELS.items() for adds in (False, True)
    }
    built = load_cuda.build_all(list(sources))
    refused = {sources[source]: error for source, error in built.items() if isinstance(error, RuntimeError)}
    for name, error in refused.items():
        logger.warning("CUTLASS's kernel %s is left out: %s", name, error)
    return tuple(name for name in cutlass.KERNELS if name not in refused)


def _ranked(candidates: list[Candidate]) -> list[Candidate]:
    """The fastest first, by a rough timing."""
    times = {candidate: min(timing.interleaved({"": candidate}, rounds=2, calls=2)[""]) for candidate in candidates}
    return sorted(times, key=times.__getitem__)


def finalists(trial, wrong) -> list[Candidate]:
    """The fastest candidates that pass the gate `wrong`."""
    if cutlass.unsupported_shape(trial.key.rows, trial.key.columns, trial.key.dtype):
        return []
    metadata = row_metadata(trial.row_bits)

    def candidates(names, walks) -> list[Candidate]:
        return [Candidate(trial, metadata, cutlass.Algorithm(name, *walk)) for name in names for walk in walks]

    ranked = _ranked(candidates(kernels(trial.key.dtype), WALKS[:1]))
    fastest = [candidate.algorithm.kernel for candidate in ranked[:KERNELS_TO_WALK]]
    passed = []
    for candidate in _ranked(candidates(fastest, WALKS))[:FINALISTS]:
        problem = wrong(candidate)
        if problem:
            logger.warning("%s: %s gives wrong results and is not used: %s", trial.key, candidate.algorithm, problem)
        else:
            passed.append(candidate)
    return passed
