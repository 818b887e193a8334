"""Layouts: the ways to cut one model over a number of GPUs, and the reason against each that is refused."""

import dataclasses
from collections.abc import Iterator

from slope_megatron.config import Config, ParallelConfig

# Flash attention keeps no scores: recomputing attention alone ("selective") would save nothing worth a row.
RECOMPUTE = ("none", "full")
# The planner's name -> the field of ParallelConfig that asks for it, and its value where there is no such field.
FIELDS = {"pipeline": ("pipeline_parallel", 1), "zero": ("zero_stage", 1), "recompute": ("recompute", "none")}


@dataclasses.dataclass(frozen=True)
class Layout:
    """TP x PP x DP = GPUs; `zero` is DeepSpeed's stage, `recompute` of activations: "none" or "full"."""

    tensor: int
    pipeline: int
    data: int
    zero: int = 1
    recompute: str = "none"
    sequence_parallel: bool = False

    def __str__(self) -> str:
        text = f"TP{self.tensor} PP{self.pipeline} DP{self.data} ZeRO-{self.zero}"
        return f"{text} recompute" if self.recompute == "full" else text

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    def flags(self) -> list[str]:
        """Flags of `slope pretrain`; what is that program's only way is left out."""
        flags = ["--tensor-parallel", str(self.tensor)]
        if self.sequence_parallel:
            flags.append("--sequence-parallel")
        for name, (field, default) in FIELDS.items():
            if getattr(self, name) != default:
                flags += ["--" + field.replace("_", "-"), str(getattr(self, name))]
        return flags

    def not_trainable(self) -> str | None:
        """Why this version of `slope pretrain` cannot run it; None: it can."""
        known = {field.name for field in dataclasses.fields(ParallelConfig)}
        lacking = [
            f"--{field.replace('_', '-')} {getattr(self, name)}"
            for name, (field, default) in FIELDS.items()
            if getattr(self, name) != default and field not in known
        ]
        return f"`slope pretrain` of this version has no {', '.join(lacking)}" if lacking else None


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def layouts(config: Config, gpus: int, gpus_per_node: int) -> Iterator[tuple[Layout, str | None]]:
    """Every TP x PP x DP x ZeRO of `gpus`, each with the reason against it; None: possible."""
    for tensor in divisors(gpus):
        for pipeline in divisors(gpus // tensor):
            data = gpus // tensor // pipeline
            reason = refusal(config, tensor, pipeline, data, gpus_per_node)
            # The pipeline schedule adds gradients up over micro-batches, which ZeRO-2 and 3 reduce at once.
            stages = (1,) if pipeline > 1 or data == 1 else (1, 2, 3)
            for zero in stages:
                for recompute in RECOMPUTE:
                    yield Layout(tensor, pipeline, data, zero, recompute, cuts_sequence(config, tensor)), reason


def cuts_sequence(config: Config, tensor: int) -> bool:
    """Sequence parallelism is free memory with tensor parallelism, where the ranks can share the sequence out."""
    return tensor > 1 and config.data.seq_length % tensor == 0


def refusal(config: Config, tensor: int, pipeline: int, data: int, gpus_per_node: int) -> str | None:
    """The first rule that the layout breaks, as a sentence; None: none."""
    layers = config.model.num_layers
    if gpus_per_node % tensor:
        return f"TP {tensor} must divide the {gpus_per_node} GPUs of a node: its all-reduces stay inside a node"
    if layers % pipeline:
        return f"PP {pipeline} must divide the {layers} layers"
    try:
        config.data.micro_batches(data)
        laid_out(config, tensor, pipeline)
    except ValueError as error:
        return str(error)
    return None


def laid_out(config: Config, tensor: int, pipeline: int) -> Config:
    """The configuration at that layout, with all checks that configurations make.

    Raises:
        ValueError: the configuration's own sentence.
    """
    parallel = dataclasses.replace(
        config.parallel,
        tensor_parallel=tensor,
        sequence_parallel=cuts_sequence(config, tensor),
        pipeline_parallel=pipeline,
        virtual_pipeline=1,
        context_parallel=1,
    )
    return dataclasses.replace(config, parallel=parallel)
