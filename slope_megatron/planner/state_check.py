"""Does the planner count right? Its state bytes beside those that a real run measured, and beside the built model.

RUN/summary.json   state_bytes: what `slope pretrain` summed over its ranks
meta device        the model package's own build of one rank's shard, without memory
"""

import dataclasses
from pathlib import Path

from slope_megatron.config import Config
from slope_megatron.config.json_file import read_json
from slope_megatron.config.saved import SavedConfig
from slope_megatron.models.counts import count, model_tensors
from slope_megatron.planner.memory import precision, state_bytes

TOLERANCE = 0.02
# Sections of a configuration that decide what is counted.
COUNTED = ("model", "slope", "parallel", "optimizer")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One number, predicted and measured."""

    name: str
    planned: float
    measured: float

    @property
    def difference(self) -> float:
        """Relative; 0 where both are nothing."""
        if not self.measured:
            return float(self.planned != 0)
        return self.planned / self.measured - 1.0

    @property
    def close(self) -> bool:
        return abs(self.difference) <= TOLERANCE


def read_run(run: Path) -> tuple[Config, dict]:
    """Configuration and summary of a finished run.

    Raises:
        ValueError: the folder holds no finished run, or one with settings that this version does not have.
    """
    for name in ("run.json", "summary.json"):
        if not (run / name).is_file():
            raise ValueError(
                f"--check {run} has no {name}: give the folder of a run that `slope pretrain` has finished"
            )
    saved = SavedConfig.read(read_json(run / "run.json", "give another run")).check(run, COUNTED)
    return saved.config(), read_json(run / "summary.json", "give another run")


def compare_with_run(config: Config, summary: dict, vocabulary: int) -> list[Comparison]:
    """The planner's state bytes beside a run's. The run adds its tensor-parallel shards up, so that what every rank has
    counts once a rank; of the data-parallel replicas it counts one.
    """
    # Of the form that was measured: a dense tail's is the last.
    config = config.form_at(max(0, summary["steps"] - 1))
    tensor = summary["tensor_parallel"]
    counts = count(model_tensors(config, vocabulary), tensor)
    backend = {"cusparselt": "kernels"}.get(summary["backend"], summary["backend"])
    if summary["dtype"] == "fp32":
        backend = "reference"
    bytes_of = precision(summary["dtype"], "fp32", config.slope.fp8 != "off")
    planned = state_bytes(counts, bytes_of, backend)
    measured = summary["state_bytes"]["model"]
    if summary.get("zero_stage") == 3 and not config.parallel.zero3_resident_operands:
        planned["operands"] = 0.0
    # Gradients are measured at the first step, mostly before the adapters have any.
    waiting = config.adapter_start not in (None, 0)
    if waiting:
        planned["gradients"] -= 4 * counts.adapters
    return [Comparison(kind, tensor * planned[kind], measured[kind]) for kind in planned]


def compare_with_build(config: Config, vocabulary: int, tensor: int, built: list[tuple[str, int]]) -> list[Comparison]:
    """The planner's elements of one rank beside those of the model package's build.

    Args:
        built: (parameter name, elements) of `meta_build`.
    """
    counts = count(model_tensors(config, vocabulary), tensor)
    adapters = sum(elements for name, elements in built if ".adapter_" in name)
    rest = sum(elements for _, elements in built) - adapters
    return [
        Comparison("parameters of a rank", counts.trained - counts.adapters, rest),
        Comparison("adapters of a rank", counts.adapters, adapters),
    ]


def report(found: list[Comparison]) -> str:
    lines = [f"{'':24}{'planned':>18}{'measured':>18}{'difference':>12}"]
    for entry in found:
        mark = "" if entry.close else f"   more than {TOLERANCE:.0%}"
        lines.append(f"{entry.name:24}{entry.planned:>18,.0f}{entry.measured:>18,.0f}{entry.difference:>12.3%}{mark}")
    return "\n".join(lines)
