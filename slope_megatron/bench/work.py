"""What one start of bench_parallel measures, as its ranks are told."""

import dataclasses

from slope_megatron.bench.models import Model
from slope_megatron.bench.progress import Clock

# Rank 0's rows so far, in the folder of the work.
ROWS = "rows.json"


@dataclasses.dataclass(frozen=True)
class Work:
    """What the ranks of one start are to measure.

    Args:
        model: one a start, because DeepSpeed's engines stay in memory.
        modes: "dense" first, and modes of SlopeConfig.
        waiting: whether the 2:4 engines are timed once more with each collective waited for where it starts.
        tokens, sequence: of a micro-batch, and of one sample.
        folder: for kernel choices and results.
        grad_reduce_dtype: as `slope pretrain` has it.
        seconds, started: budget and start of the whole benchmark, see `progress.Clock`.
    """

    model: Model
    modes: tuple[str, ...]
    tensor_parallel: int
    blocks: int
    tokens: int
    sequence: int
    micro_batches: int
    vocabulary: int
    rounds: int
    waiting: bool
    folder: str
    grad_reduce_dtype: str = "auto"
    seconds: float | None = None
    started: float | None = None

    def clock(self, speaks: bool = True) -> Clock:
        return Clock(self.seconds, self.started, speaks)
