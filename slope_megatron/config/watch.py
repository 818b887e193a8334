"""WatchConfig: what a run looks out for, and where its figures go. Nothing of it changes what is computed."""

import dataclasses

from slope_megatron.config.fields import COUNT, OFF_OR_POSITIVE, POSITIVE, check_fields, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Bad steps, loss spikes, ranks that hang, figures of each layer, and further writers of the metrics."""

    max_bad_steps: int = option(
        10,
        "stop after this many steps in a row whose loss or gradients are not finite (fp16 gradients count once the "
        "loss scale has come down to 1); such a step updates nothing, and its samples are logged",
        must=COUNT,
    )
    spike_factor: float = option(
        10.0,
        "log a loss that lies this many standard deviations (estimated by the median and the median absolute deviation "
        "of the last 64 losses) above their median; 0: never",
        must=OFF_OR_POSITIVE,
    )
    hang_timeout: float = option(
        600.0,
        "seconds without progress after which the rank that hangs is named and the run ends; must be longer than the "
        "longest step, validation or checkpoint; watched from the second step on; 0: never",
        must=OFF_OR_POSITIVE,
    )
    layer_stats_interval: int = option(
        0,
        "steps between two lines of metrics with each weight matrix's gradient norm, drift from its start and energy "
        "lost to the second pruning; such a step sums its gradients over the replicas once more; 0: never",
        must=OFF_OR_POSITIVE,
    )
    tensorboard: bool = option(
        False, "write the metrics for TensorBoard, too, to RUN/tensorboard (needs the package `tensorboard`)"
    )
    wandb: str | None = option(
        None,
        "write the metrics for Weights & Biases, too, as this project, to RUN/wandb (needs the package `wandb`; "
        "offline unless WANDB_MODE says otherwise: `wandb sync` uploads it); unset: not",
    )
    peak_tflops: float | None = option(
        None,
        "dense peak of one device in TFLOP/s, which MFU is a share of (see METRICS below); unset: that of a known GPU "
        "(A100 312, H100 and H200 989 in bf16, V100 125 in fp16), else MFU is left out",
        must=POSITIVE,
    )

    def __post_init__(self):
        check_fields(self)
