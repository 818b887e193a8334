"""cuSPARSELt's candidates for one product: its algorithms by number, on operands whole or cut into row tiles."""

import abc
import logging
from collections.abc import Iterable
from typing import Any

import torch

from slope_kernels import cusparselt
from slope_megatron.ops import choices
from slope_megatron.ops.autotune import gate, timing
from slope_megatron.ops.autotune.trials import Trial
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import layout
from slope_megatron.sparsity.float8 import E4M3

logger = logging.getLogger(__name__)
FINALISTS = 3
# An operand in tiles is tried with the algorithms that were best for the whole one.
TRIED_IN_TILES = 6
# The first algorithms, all that bf16 has on sm_90 (cuSPARSELt 0.8.0). fp16 has 52, of which some past 32 do not merely
# give wrong results: they end the process's CUDA context with an illegal instruction.
MOST_CONFIGS = 21


class Candidate(abc.ABC):
    """A trial's sparse product with one algorithm; None: the library's default."""

    tiles = 1

    def __init__(self, trial: Any, algorithm: cusparselt.Algorithm | None, product: cusparselt.Product):
        self.trial, self.algorithm = trial, algorithm
        self.plan = cusparselt.Plan(product, algorithm)

    def enqueue(self, operand: int, x: torch.Tensor, y: int, factor: float = 1.0) -> None:
        """`operand` and `y` are addresses."""
        stream = torch.cuda.current_stream(x.device).cuda_stream
        self.plan.run(operand, x.data_ptr(), y, stream, factor=factor)

    @abc.abstractmethod
    def __call__(self) -> None:
        """Enqueue the product."""


class WeightCandidate(Candidate):
    """Of a 16-bit weight, its tiles one after the other."""

    def __init__(self, trial, algorithm: cusparselt.Algorithm | None, tiles: int):
        key, (tokens, columns), device = trial.key, trial.x_TS.shape, trial.x_TS.device.index
        shape = cusparselt.Product(key.rows // tiles, columns, tokens, key.dtype, device, key.rows)
        super().__init__(trial, algorithm, shape)
        self.tiles, self.operand = tiles, trial.operand(tiles)

    def __call__(self) -> None:
        x_TS = self.trial.x_TS
        step = self.plan.product.rows * x_TS.element_size()
        for tile in range(self.tiles):
            start = self.operand.data_ptr() + tile * self.operand.numel() // self.tiles
            self.enqueue(start, x_TS, self.trial.y_TR.data_ptr() + tile * step)


class WgradCandidate(Candidate):
    """Of `full` mode's wgrad; a call writes the operand too, as every micro-batch must, and keeps half of dW."""

    def __init__(self, trial, algorithm: cusparselt.Algorithm | None):
        key, (columns, width), device = trial.key, trial.x_SK.shape, trial.x_SK.device.index
        shape = cusparselt.Product(key.rows, columns, width, key.dtype, device, width, straight=True)
        super().__init__(trial, algorithm, shape)

    def __call__(self) -> None:
        trial = self.trial
        trial.write_operand()
        self.enqueue(trial.operand.data_ptr(), trial.x_SK, trial.dw_NK.data_ptr())
        trial.keep_half()


class Float8Candidate(Candidate):
    """In e4m3, with the pass that scales the result, which mostly finds nothing to do."""

    def __init__(self, trial, algorithm: cusparselt.Algorithm | None):
        key, (tokens, rows), device = trial.key, trial.y_TR.shape, trial.y_TR.device.index
        shape = cusparselt.Product(rows, key.columns, tokens, E4M3, device, rows, output=trial.y_TR.dtype)
        super().__init__(trial, algorithm, shape)

    def __call__(self) -> None:
        from slope_kernels.triton.quantize import rescale

        trial = self.trial
        self.enqueue(trial.operand.data_ptr(), trial.q_TS, trial.y_TR.data_ptr(), factor=2.0**-18)
        rescale(trial.y_TR, trial.scale, trial.scale, 2.0**18, None)


def candidate_of(trial: Trial, algorithm: cusparselt.Algorithm | None, tiles: int) -> Candidate:
    """A trial's candidate; only a 16-bit weight's operand is ever cut."""
    if trial.key.product is Product.WGRAD:
        return WgradCandidate(trial, algorithm)
    if trial.key.dtype == E4M3:
        return Float8Candidate(trial, algorithm)
    return WeightCandidate(trial, algorithm, tiles)


def ranking(trial: Trial, tiles: int, configs: Iterable[int]) -> list[int]:
    """The library's algorithms from the fastest on, by a rough timing; those that cannot run are left out.

    They are tried by number, not by the library's own search, which tries all: see MOST_CONFIGS.
    """
    timed = []
    for config in configs:
        algorithm = cusparselt.Algorithm(config)
        try:
            candidate = candidate_of(trial, algorithm, tiles)
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
    earlier = choices.earlier(key)
    if earlier:
        return [earlier.tiles]
    height = key.rows // key.columns
    if height < 2 or not layout.probe(device, key.dtype).known_metadata:
        return [1]
    cuts = {2, height} if key.rows % key.columns == 0 else {2}
    return [1, *sorted(tiles for tiles in cuts if key.rows % (64 * tiles) == 0)]


def finalists(trial: Trial, numbers_of_tiles: list[int] | None = None) -> list[Candidate]:
    """The fastest few of each number of tiles that pass the gate.

    Args:
        numbers_of_tiles: None: those of `tilings`.
    """
    tried = tilings(trial.key, trial.y_TR.device) if numbers_of_tiles is None else numbers_of_tiles
    configs: Iterable[int] = range(min(MOST_CONFIGS, candidate_of(trial, None, 1).plan.algorithm_count()))
    found = []
    for tiles in tried:
        ranked = ranking(trial, tiles, configs)
        configs = ranked[:TRIED_IN_TILES]
        candidates = (candidate_of(trial, cusparselt.Algorithm(config), tiles) for config in ranked[:FINALISTS])
        found += gate.passing(candidates)
    return found


def confirmed(trial: Trial, known: Choice) -> list[Candidate]:
    """The candidate of a choice that was made before, if it still runs and passes the gate."""
    try:
        return gate.passing([candidate_of(trial, known.algorithm, known.tiles)])
    except torch.AcceleratorError:
        # The context is lost: nothing can run after this.
        raise
    except RuntimeError as error:
        logger.info("%s: algorithm %s, which was chosen before, cannot run: %s", trial.key, known.algorithm, error)
        return []
