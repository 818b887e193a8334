"""What bench_parallel and bench_model measure, as those are told who build the engines."""

import dataclasses

from slope_megatron.bench.models import Model
from slope_megatron.bench.progress import Clock
from slope_megatron.config import ModelConfig

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


@dataclasses.dataclass(frozen=True)
class ModelWork:
    """What `slope bench model` times, whatever the mode."""

    name: str
    model: ModelConfig
    whole_depth: int
    shard_of: int
    sequence: int
    micro_batch: int
    micro_batches: int
    steps: int
    warmup: int
    profiled: int
    adapter_rank: int | str = 0
    cuda_graphs: str = "auto"

    def note(self) -> str:
        """For the CSV's first line and the chart."""
        parts = [f"{self.name}, {self.micro_batches} micro-batches of {self.micro_batch} x {self.sequence} tokens"]
        if self.model.num_layers != self.whole_depth:
            parts.append(f"{self.model.num_layers} of {self.whole_depth} layers")
        if self.shard_of > 1:
            parts.append(f"one rank's shapes of TP {self.shard_of} on one GPU, without the collectives")
        return "; ".join(parts)
