"""OptimizerConfig: the update rule, who computes it, the learning rate's schedule, and fp16's loss scale."""

import dataclasses
import math
from collections.abc import Callable

from slope_megatron.config.fields import NOT_NEGATIVE, OFF_OR_POSITIVE, POSITIVE, SHARE, Rule, check_fields, option

# From 1 to 0, of the way from the peak to the floor, at `progress` in [0, 1] through a decay.
DECAY_FORMS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or LAMB on fp32 masters; the learning rate is a function of the step alone, with linear warm-up."""

    optimizer: str = option(
        "adamw",
        "update rule; lamb: Adam's update scaled per parameter by its trust ratio, for BERT's large batches "
        "(as published: --beta2 0.999 --eps 1e-6 --weight-decay 0.01 --lr-schedule poly --min-lr 0)",
        choices=("adamw", "lamb"),
    )
    adam_backend: str = option(
        "auto",
        "whose AdamW; auto: with --offload-optimizer DeepSpeed's for CPUs where it builds, on GPUs apex's where it "
        "is installed, otherwise torch's; the choice and its reason are logged",
        choices=("auto", "torch", "apex", "deepspeed"),
    )
    lr: float = option(6e-4, "peak learning rate")
    min_lr: float = option(6e-5, "learning rate at the last step; of no effect on a constant schedule")
    lr_schedule: str = option(
        "cosine",
        "from the peak to --min-lr after warm-up: cosine, linear, poly ((1 - p)^power at progress p, as BERT); "
        "constant stays at the peak; wsd (warm-up, stable, decay) stays there until the last --decay-fraction",
        choices=("cosine", "linear", "poly", "constant", "wsd"),
    )
    decay_fraction: float = option(
        0.1,
        "share of --steps in which the wsd schedule decays",
        must=Rule("it must be positive and at most 1", lambda value: 0 < value <= 1),
    )
    decay_form: str = option(
        "exponential",
        "how the wsd schedule decays to --min-lr: exponential (the same factor each step, as MiniCPM; --min-lr must be "
        "positive), linear, cosine, sqrt (1 - sqrt(p) at progress p)",
        choices=("exponential", *DECAY_FORMS),
    )
    poly_power: float = option(0.5, "exponent of the poly schedule; BERT's is 0.5", must=POSITIVE)
    warmup_steps: int = option(100, "steps of linear warm-up", must=NOT_NEGATIVE)
    warmup_fraction: float | None = option(
        None, "warm-up as a share of --steps; given, it replaces --warmup-steps", must=SHARE
    )
    weight_decay: float = option(0.1, "decoupled weight decay (none on biases and norms)", must=NOT_NEGATIVE)
    sparse_weight_decay: float | None = option(
        None, "weight decay of the packed values; unset: --weight-decay", must=NOT_NEGATIVE
    )
    embedding_lr_multiplier: float = option(
        1.0, "learning rate of the embeddings (an output layer tied to them too), as a multiple of --lr", must=POSITIVE
    )
    embedding_weight_decay: float | None = option(
        None, "weight decay of the embeddings; unset: --weight-decay", must=NOT_NEGATIVE
    )
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    lamb_trust_no_decay: bool = option(
        False, "LAMB: a trust ratio for biases and norms too; as published, what does not decay has none"
    )
    z_loss: float = option(
        0.0,
        "coefficient of the z-loss, the mean of (log sum exp of a token's logits)^2, which keeps logits small; PaLM's "
        "is 1e-4; it acts on the gradients alone: losses that are reported stay the cross-entropy",
        must=OFF_OR_POSITIVE,
    )
    clip_grad: float = option(1.0, "global gradient norm to clip at; 0: no clipping")
    initial_loss_scale: float = option(65536.0, "fp16: the loss scale at the start, a power of two; overflows halve it")
    loss_scale_window: int = option(
        1000, "fp16: steps without overflow after which the loss scale doubles", must=POSITIVE
    )
    loss_scale_hysteresis: int = option(2, "fp16: overflows that it takes to halve the loss scale", must=POSITIVE)

    def __post_init__(self):
        check_fields(self)
        if not 0 <= self.min_lr <= self.lr or self.lr <= 0:
            raise ValueError(
                f"--lr is {self.lr} and --min-lr {self.min_lr}: they must satisfy 0 <= min-lr <= lr and lr > 0"
            )
        if self.lr_schedule == "wsd" and self.decay_form == "exponential" and self.min_lr == 0:
            raise ValueError(
                "--min-lr is 0 with --lr-schedule wsd and --decay-form exponential: no factor leads there; give a "
                "positive --min-lr, or another --decay-form"
            )
        if self.initial_loss_scale < 1 or not math.log2(self.initial_loss_scale).is_integer():
            raise ValueError(
                f"--initial-loss-scale is {self.initial_loss_scale}: it must be a power of two, 1 or more; take 65536"
            )
        if self.optimizer == "lamb" and self.adam_backend != "auto":
            raise ValueError(
                f"--adam-backend is {self.adam_backend} with --optimizer lamb: it chooses between AdamWs; leave it out"
            )
        if self.optimizer == "lamb" and self.embedding_weight_decay == 0.0:
            raise ValueError(
                "--embedding-weight-decay is 0 with --optimizer lamb: what does not decay has no trust ratio, and "
                "embeddings would move too far; give a small one"
            )

    @property
    def sparse_decay(self) -> float:
        """Weight decay of the packed values."""
        return self.weight_decay if self.sparse_weight_decay is None else self.sparse_weight_decay

    @property
    def groups_embeddings(self) -> bool:
        """Whether the embeddings are a parameter group of their own."""
        return self.embedding_lr_multiplier != 1.0 or self.embedding_weight_decay is not None

    @property
    def embedding_decay(self) -> float:
        """Weight decay of the embeddings."""
        return self.weight_decay if self.embedding_weight_decay is None else self.embedding_weight_decay

    def warmup(self, total_steps: int) -> int:
        """Steps of linear warm-up in a run of `total_steps`."""
        return self.warmup_steps if self.warmup_fraction is None else round(self.warmup_fraction * total_steps)

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of the `step`-th update, counted from 0."""
        warmup = self.warmup(total_steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.lr_schedule == "wsd":
            return self.stable_then_decayed(step, total_steps)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return self.min_lr + (self.lr - self.min_lr) * self.remaining(progress)

    def remaining(self, progress: float) -> float:
        """What is left, from 1 to 0, of the way from the peak to the floor at `progress` in [0, 1] after warm-up."""
        if self.lr_schedule == "cosine":
            return DECAY_FORMS["cosine"](progress)
        power = {"linear": 1.0, "poly": self.poly_power, "constant": 0.0}[self.lr_schedule]
        return (1.0 - progress) ** power

    def decay_steps(self, total_steps: int) -> int:
        """Steps of the wsd schedule's decay, the last ones of the run."""
        return max(1, round(self.decay_fraction * total_steps))

    def stable_then_decayed(self, step: int, total_steps: int) -> float:
        """The wsd schedule after its warm-up (arXiv 2404.06395, section 4)."""
        decay = self.decay_steps(total_steps)
        progress = min(1.0, max(0.0, (step - (total_steps - decay)) / decay))
        if self.decay_form == "exponential":
            return self.lr * (self.min_lr / self.lr) ** progress
        return self.min_lr + (self.lr - self.min_lr) * DECAY_FORMS[self.decay_form](progress)
