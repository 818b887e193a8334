"""The rest of a run: optimizer, data, and the run itself."""

import dataclasses
import math

from slope_megatron.config.fields import check_choices, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on fp32 masters; cosine schedule with linear warm-up, a function of the step alone."""

    lr: float = option(6e-4, "peak learning rate")
    min_lr: float = option(6e-5, "learning rate at the last step")
    warmup_steps: int = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.1, "decoupled weight decay (none on biases and norms)")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.95, "AdamW beta2")
    eps: float = option(1e-8, "AdamW epsilon")
    clip_grad: float = option(1.0, "global gradient norm to clip at; 0: no clipping")

    def __post_init__(self):
        check_choices(self)
        if not 0 <= self.min_lr <= self.lr or self.lr <= 0:
            raise ValueError(
                f"--lr is {self.lr} and --min-lr {self.min_lr}: they must satisfy 0 <= min-lr <= lr and lr > 0"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"--warmup-steps is {self.warmup_steps}: it must not be negative")

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of the `step`-th update, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prepared data and how it is cut into batches."""

    data: str = option("", "folder that `slope data prepare` wrote")
    cache: str | None = option(None, "folder for Megatron's sample index; unset: a folder in the prepared data")
    seq_length: int = option(1024, "tokens of one sample")
    micro_batch_size: int = option(1, "samples of one forward pass on one replica")
    global_batch_size: int = option(8, "samples of one optimizer step over all replicas")

    def __post_init__(self):
        check_choices(self)
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")

    def micro_batches(self, data_parallel: int) -> int:
        """Micro-batches of one step on one replica.

        Raises:
            ValueError: the global batch is no multiple of micro-batch x replicas.
        """
        part = self.micro_batch_size * data_parallel
        if self.global_batch_size % part:
            raise ValueError(
                f"--global-batch-size is {self.global_batch_size}: it must be a multiple of micro-batch "
                "x data-parallel "
                f"= {self.micro_batch_size} x {data_parallel} = {part}"
            )
        return self.global_batch_size // part


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: how long, how precise, where it writes."""

    out: str = option("", "run folder: configuration, metrics, checkpoints")
    init_from: str | None = option(
        None, "dense checkpoint (Megatron's torch_dist, or of a --no-slope run); pruned on load"
    )
    steps: int = option(1000, "optimizer steps in all")
    stop_at: int | None = option(
        None,
        "stop cleanly after this step, as if the time were up; schedules still aim at --steps; 0: only validate and "
        "save what the run would begin with",
    )
    seed: int = option(1234, "seed of everything random: weights, patterns, data order, dropout")
    dtype: str = option("auto", "parameter type; auto: bf16 on GPUs, on CPUs fp32", choices=("auto", "bf16", "fp32"))
    eval_interval: int = option(200, "steps between two validations")
    eval_samples: int = option(64, "validation samples, the same ones each time")
    save_interval: int = option(500, "steps between two checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints kept")
    log_interval: int = option(10, "steps between two lines of metrics.jsonl")
    resume: bool = option(False, "go on from the newest checkpoint of the run folder")
    auto_resume: bool = option(
        False, "go on if the run folder has a checkpoint, else start: for jobs that are requeued"
    )
    overwrite: bool = option(False, "delete the run that is in the run folder, and start anew")

    def __post_init__(self):
        check_choices(self)
        for name in (
            "steps",
            "eval_interval",
            "eval_samples",
            "save_interval",
            "keep_checkpoints",
            "log_interval",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")
        if self.stop_at is not None and self.stop_at < 0:
            raise ValueError(f"--stop-at is {self.stop_at}: it must be a step, or 0 to train none")
        given = [flag for flag in ("resume", "auto_resume", "overwrite") if getattr(self, flag)]
        if len(given) > 1:
            first, second = (f"--{flag.replace('_', '-')}" for flag in given[:2])
            raise ValueError(
                f"{first} and {second} are both given: each says what to do with a run that is there; give one"
            )
