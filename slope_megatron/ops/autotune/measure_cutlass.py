"""Our own kernels' candidates for one product: every kernel, then the walks of the fastest ones.

They meet the same numerics gate and the same contest as cuSPARSELt's algorithms (`measure`).
"""

import functools
import logging

import torch

from slope_kernels import cutlass, load_cuda, packed_wgrad
from slope_megatron.ops.autotune import timing
from slope_megatron.ops.autotune.trials import KernelCandidate, OwnTrial

logger = logging.getLogger(__name__)
# (swizzle, raster): the default walk first; wider swizzles never won.
WALKS = ((1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2))
KERNELS_TO_WALK = 2
FINALISTS = 2


@functools.cache
def kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels of a weight's products that compile here; why others do not is said once.

    Each with both epilogues at once: the one that adds is wanted when adapters join, and a run would wait for it then.
    """
    return _compiled(
        {
            cutlass.source(kernel, dtype, adds): name
            for name, kernel in cutlass.KERNELS.items()
            for adds in (False, True)
        }
    )


@functools.cache
def packing_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """The same of wgrad's kernels with the packing epilogue."""
    return _compiled({packed_wgrad.source(kernel, dtype): name for name, kernel in packed_wgrad.KERNELS.items()})


def _compiled(sources: dict[load_cuda.Source, str]) -> tuple[str, ...]:
    """Names of those whose every source compiles; of all one reason why not, of one the compiler's last lines."""
    reason = cutlass.unsupported()
    if reason:
        _say_none(reason)
        return ()
    built = load_cuda.build_all(list(sources))
    refused = {sources[source]: error for source, error in built.items() if isinstance(error, RuntimeError)}
    for name, error in refused.items():
        logger.warning("CUTLASS's kernel %s is left out: %s", name, error)
    return tuple(name for name in dict.fromkeys(sources.values()) if name not in refused)


@functools.cache
def _say_none(reason: str) -> None:
    logger.info("our own kernels are not among the candidates: %s", reason)


def _ranked(candidates: list[KernelCandidate]) -> list[KernelCandidate]:
    """The fastest first, by a rough timing."""
    times = {candidate: min(timing.interleaved({"": candidate}, rounds=2, calls=2)[""]) for candidate in candidates}
    return sorted(times, key=times.__getitem__)


def finalists(trial: OwnTrial, wrong) -> list[KernelCandidate]:
    """The fastest candidates that pass the gate `wrong`."""
    if cutlass.unsupported_shape(trial.key.rows, trial.key.columns, trial.key.dtype):
        return []

    def candidates(names, walks) -> list[KernelCandidate]:
        return [trial.own_candidate(cutlass.Algorithm(name, *walk)) for name in names for walk in walks]

    ranked = _ranked(candidates(trial.own_kernels(), WALKS[:1]))
    fastest = [candidate.algorithm.kernel for candidate in ranked[:KERNELS_TO_WALK]]
    passed = []
    for candidate in _ranked(candidates(fastest, WALKS))[:FINALISTS]:
        problem = wrong(candidate)
        if problem:
            logger.warning("%s: %s gives wrong results and is not used: %s", trial.key, candidate.algorithm, problem)
        else:
            passed.append(candidate)
    return passed
