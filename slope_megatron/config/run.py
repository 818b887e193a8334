"""The rest of a run: data, and the run itself."""

import dataclasses

from slope_megatron.config.fields import COUNT, SHARE, Rule, check_fields, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prepared data and how it is cut into batches."""

    data: str = option("", "required: folder that `slope data prepare` wrote")
    cache: str | None = option(None, "folder for Megatron's sample index; unset: a folder in the prepared data")
    seq_length: int = option(1024, "tokens of one sample", must=COUNT)
    micro_batch_size: int = option(
        1,
        "samples of one forward pass on one replica; loss and gradient are those of the global batch, whatever it is",
        must=COUNT,
    )
    global_batch_size: int = option(8, "samples of one optimizer step over all replicas", must=COUNT)
    mlm_probability: float = option(
        0.15,
        "bert: share of the tokens that are asked for",
        must=Rule("it must lie between 0 and 1; take 0.15", lambda value: 0 < value < 1),
    )
    mlm_whole_words: bool = option(False, "bert: hide all pieces of a word together")
    short_sequences: float = option(0.1, "bert: share of the samples that are shorter than the sequence", must=SHARE)

    def __post_init__(self):
        check_fields(self)

    def micro_batches(self, data_parallel: int) -> int:
        """Micro-batches of one step on one replica.

        Raises:
            ValueError: the global batch is no multiple of micro-batch x replicas.
        """
        part = self.micro_batch_size * data_parallel
        if self.global_batch_size % part:
            raise ValueError(
                f"--global-batch-size is {self.global_batch_size}: it must be a multiple of micro-batch x "
                f"data-parallel = {self.micro_batch_size} x {data_parallel} = {part}; take "
                f"{-(-self.global_batch_size // part) * part}, say"
            )
        return self.global_batch_size // part


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: how long, how precise, where it writes."""

    out: str = option("", "required: run folder, which gets configuration, metrics, checkpoints")
    init_from: str | None = option(
        None,
        "start from these weights, with a new optimizer: a run folder (its newest checkpoint) or a checkpoint; "
        "packed ones keep their patterns, dense ones (also Megatron's torch_dist) are pruned on load; unset: fresh "
        "weights",
    )
    steps: int = option(1000, "optimizer steps in all", must=COUNT)
    stop_at: int | None = option(
        None,
        "stop cleanly after this step, as if the time were up; schedules still aim at --steps; 0: only validate and "
        "save what the run would begin with",
        must=Rule("it must be a step, or 0 to train none", lambda value: value >= 0),
    )
    seed: int = option(1234, "seed of everything random: weights, patterns, data order, dropout")
    dtype: str = option(
        "auto",
        "parameter type; auto: bf16 on GPUs, on CPUs fp32; fp16 scales the loss (--initial-loss-scale)",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    deterministic: bool = option(
        False,
        "GPUs: the same bits in every run at the same layout, resumed or not, on machines of one kind; only algorithms "
        "that add in a fixed order, which are slower. CPUs always compute so",
    )
    cuda_graphs: str = option(
        "auto",
        "GPUs: capture forward and backward of a micro-batch once and replay it, so that the GPU does not wait for "
        "Python; auto: where the layout has been tested (one line of the log says why not); on: refuse what cannot be "
        "captured",
        choices=("auto", "on", "off"),
    )
    eval_interval: int = option(200, "steps between two validations", must=COUNT)
    eval_samples: int = option(
        64,
        "validation samples, the same ones each time; 0: none",
        must=Rule("it must be at least 1, or 0 to validate nothing", lambda value: value >= 0),
    )
    save_interval: int = option(
        500,
        "steps between two checkpoints; 0: none is written, not even at the end (for trials of a few steps), but where "
        "a dense start ends or a dense tail begins, until the run is complete",
        must=Rule("it must be at least 1, or 0 to save nothing", lambda value: value >= 0),
    )
    keep_checkpoints: int = option(2, "newest checkpoints kept", must=COUNT)
    keep_every: int | None = option(None, "checkpoints of every n-th step are kept for ever; unset: none", must=COUNT)
    async_save: bool = option(
        True,
        "write checkpoints in the background: the state is copied to host memory, and training goes on while a thread "
        "of each rank writes and checks its file; the next checkpoint waits for the last",
    )
    log_interval: int = option(
        10, "steps between two lines of metrics.jsonl and, off a terminal, of the log", must=COUNT
    )
    resume: bool = option(False, "go on from the newest checkpoint of the run folder")
    auto_resume: bool = option(
        False,
        "go on if the run folder has a checkpoint, else start: for jobs that are requeued; a newest checkpoint "
        "that is corrupt, or that a rank cannot read, is set aside, and the one before it taken; without an intact one "
        "it stops",
    )
    overwrite: bool = option(False, "delete the run that is in the run folder, and start anew")

    def __post_init__(self):
        check_fields(self)
        given = [flag for flag in ("resume", "auto_resume", "overwrite") if getattr(self, flag)]
        if len(given) > 1:
            first, second = (f"--{flag.replace('_', '-')}" for flag in given[:2])
            raise ValueError(
                f"{first} and {second} are both given: each says what to do with a run that is there; give one"
            )

    @property
    def last_step(self) -> int:
        """The step after which this start ends."""
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)
