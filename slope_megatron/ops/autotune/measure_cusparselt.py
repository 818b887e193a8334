"""cuSPARSELt's candidates for one product: its algorithms by number, on operands whole or cut into row tiles."""

import logging
from collections.abc import Iterable

import torch

from slope_kernels import cusparselt
from slope_megatron.ops import choices
from slope_megatron.ops.autotune import gate, timing
from slope_megatron.ops.autotune.trials import PlannedCandidate, Trial
from slope_megatron.ops.choices import Key, Product
from slope_megatron.ops.custom_ops import layout
from slope_megatron.sparsity.float8 import E4M3

logger = logging.getLogger(__name__)
FINALISTS = 3
# An operand in tiles is tried with the algorithms that were best for the whole one.
TRIED_IN_TILES = 6
# The first algorithms, all that bf16 has on sm_90 (cuSPARSELt 0.8.0). fp16 has 52, of which some past 32 do not merely
# give wrong results: they end the process's CUDA context with an illegal instruction.
MOST_CONFIGS = 21


def ranking(trial: Trial, tiles: int, configs: Iterable[int]) -> list[int]:
    """The library's algorithms from the fastest on, by a rough timing; those that cannot run are left out.

    They are tried by number, not by the library's own search, which tries all: see MOST_CONFIGS.
    """
    timed = []
    for config in configs:
        algorithm = cusparselt.Algorithm(config)
        try:
            candidate = trial.candidate(algorithm, tiles)
            times = timing.interleaved({"": candidate}, rounds=2, calls=2)[""]
        except torch.AcceleratorError:
            # The context is lost: nothing can run after this.
            raise
        except RuntimeError as error:
            logger.debug("%s: algorithm %d cannot run: %s", trial.key, config, error)
            continue
        timed.append((min(times), config))
        candidate.plan.close()
    return [config for _, config in sorted(timed)]


def tilings(key: Key, device: torch.device) -> list[int]:
    """Whole; where the operand is taller than wide, also in halves, and in squares where it is a whole number high.

    A shape that has been measured for other tokens keeps its tiles: a weight has one operand. wgrad's lives for one
    product and stays whole; so do operands in e4m3.
    """
    if key.product is Product.WGRAD or key.dtype == E4M3:
        return [1]
    fixed = choices.fixed_tiles(key)
    if fixed:
        return [fixed]
    height = key.rows // key.columns
    if height < 2 or not layout.probe(device, key.dtype).known_metadata:
        return [1]
    cuts = {2, height} if key.rows % key.columns == 0 else {2}
    return [1, *sorted(tiles for tiles in cuts if key.rows % (64 * tiles) == 0)]


def finalists(trial: Trial, numbers_of_tiles: list[int] | None = None) -> list[PlannedCandidate]:
    """The fastest few of each number of tiles that pass the gate.

    Args:
        numbers_of_tiles: None: those of `tilings`.
    """
    tried = tilings(trial.key, trial.y_TR.device) if numbers_of_tiles is None else numbers_of_tiles
    configs: Iterable[int] = range(min(MOST_CONFIGS, trial.candidate(None, 1).plan.algorithm_count()))
    found = []
    for tiles in tried:
        ranked = ranking(trial, tiles, configs)
        configs = ranked[:TRIED_IN_TILES]
        candidates = (trial.candidate(cusparselt.Algorithm(config), tiles) for config in ranked[:FINALISTS])
        found += gate.passing(candidates)
    return found
