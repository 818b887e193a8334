"""The planner: memory, nodes and time of every layout, dense and 2:4, and which one to take."""

import dataclasses
import math

from slope_megatron.config import Config
from slope_megatron.launch.cluster import Cluster
from slope_megatron.planner.layout import Layout, layouts
from slope_megatron.planner.memory import GIB, Holding, fullest_gpu, precision
from slope_megatron.planner.speed import Rates, bubble, prunes_wgrad, step_seconds

KINDS = ("dense", "sparse")


@dataclasses.dataclass(frozen=True)
class Question:
    """What is planned for.

    Args:
        gradients: "fp32" accumulation, or "bf16": of the weights' type.
        backend: whose operands a packed weight has: "reference", "kernels" (cuSPARSELt's) or "cutlass".
        offload: the optimizer's state in host memory.
        fused: AdamW in its fused form, without temporaries.
    """

    config: Config
    vocabulary: int
    cluster: Cluster
    rates: Rates
    gradients: str = "fp32"
    backend: str = "kernels"
    offload: bool = False
    fused: bool = False

    @property
    def dtype(self) -> str:
        """`auto` is the cluster's."""
        asked = self.config.train.dtype
        return self.cluster.dtype if asked == "auto" else asked

    @property
    def holding(self) -> Holding:
        """Without 2:4 tensor cores every backend unpacks."""
        backend = self.backend if self.cluster.sparse_24 else "reference"
        bytes_of = precision(self.dtype, self.gradients, self.config.slope.fp8 != "off")
        return Holding(bytes_of, backend, self.offload, self.fused)

    @property
    def lacks_pruned_wgrad(self) -> bool:
        """Whether mode "full" is asked for where a wgrad is dense nevertheless."""
        slope, cluster = self.config.slope, self.cluster
        asked = slope.packed and slope.mode == "full" and cluster.sparse_24
        return asked and not prunes_wgrad(True, cluster) and not self.rates.measures("sparse", "wgrad")

    def name(self, kind: str) -> str:
        """A kind as it is written: 2:4, or the baseline that stands in its place."""
        return (
            "dense" if kind == "dense" else "2:4" if self.config.slope.method == "slope" else self.config.slope.method
        )

    def twin(self, kind: str) -> Config:
        """The configuration with, or without, 2:4 layers."""
        slope = dataclasses.replace(self.config.slope, enabled=kind == "sparse")
        return dataclasses.replace(self.config, slope=slope)


@dataclasses.dataclass(frozen=True)
class Row:
    """One layout of one kind of model.

    Args:
        bytes: of the fullest GPU, by what they are for.
        refused: the reason against it; None: possible.
    """

    layout: Layout
    kind: str
    bytes: dict[str, float]
    seconds: float
    bubble: float
    fits: bool
    refused: str | None

    @property
    def gib(self) -> float:
        return math.fsum(self.bytes.values()) / GIB


def rows(question: Question, nodes: int, only: Layout | None = None) -> list[Row]:
    """All possible layouts on `nodes` nodes, both kinds. `only`: TP, PP and ZeRO stage that are asked for."""
    found = []
    cluster = question.cluster
    for layout, refused in layouts(question.config, nodes * cluster.gpus_per_node, cluster.gpus_per_node):
        if refused is None and (only is None or matches(layout, only)):
            found += [row(question, layout, kind) for kind in KINDS]
    return found


def matches(layout: Layout, only: Layout) -> bool:
    """Whether a layout is one that is asked for; 0 and "" leave a choice."""
    wanted = {key: value for key, value in vars(only).items() if value}
    return all(getattr(layout, key) == value for key, value in wanted.items())


def row(question: Question, layout: Layout, kind: str) -> Row:
    config, cluster = question.twin(kind), question.cluster
    how = question.holding
    sizes = fullest_gpu(config, layout, question.vocabulary, how)
    fits = math.fsum(sizes.values()) <= cluster.gpu_memory_gib * GIB and host_fits(question, layout, config)
    seconds = step_seconds(config, layout, cluster, question.rates, question.vocabulary, how.precision)
    micro_batches = config.data.micro_batches(layout.data)
    return Row(layout, kind, sizes, seconds, bubble(layout, micro_batches), fits, layout.not_trainable())


def host_fits(question: Question, layout: Layout, config: Config) -> bool:
    """Whether an offloaded optimizer fits the nodes' memory; half of it is left to everything else."""
    if not question.offload:
        return True
    on_gpu = dataclasses.replace(question.holding, offload=False)
    kept = fullest_gpu(config, layout, question.vocabulary, on_gpu)
    needed = kept["optimizer"] * min(question.cluster.gpus_per_node, layout.gpus)
    return needed <= question.cluster.host_memory_gib * GIB / 2


def recommend(found: list[Row], kind: str, name: str) -> tuple[Row, str]:
    """The fastest row of `kind` that fits and that `slope pretrain` can run, and why it.

    Args:
        name: how the kind is written.
    Raises:
        ValueError: nothing fits; says what comes nearest.
    """
    mine = [row for row in found if row.kind == kind]
    fitting = [row for row in mine if row.fits]
    if not fitting:
        raise ValueError(nothing_fits(mine, name))
    runnable = [row for row in fitting if row.refused is None] or fitting
    # Nearly equal estimates say nothing: of those, the one with the fewest cuts.
    fastest = min(row.seconds for row in runnable)
    near = [row for row in runnable if row.seconds <= 1.02 * fastest]
    best = min(near, key=lambda row: cuts(row.layout))
    why = f"of {len(mine)} possible layouts {len(fitting)} fit, and this is the fastest"
    if len(near) > 1:
        why += f" (or within 2 % of it, with the fewest cuts, among {len(near)})"
    if best.refused:
        why += f"; {best.refused}"
    elif len(runnable) < len(fitting):
        why += f" of the {len(runnable)} that this version of `slope pretrain` runs"
    return best, why


def cuts(layout: Layout) -> tuple:
    """How much of a layout is there to save memory: the plain one sorts first."""
    return (layout.recompute != "none", layout.pipeline, layout.tensor, layout.zero)


def nothing_fits(mine: list[Row], name: str) -> str:
    """The sentence for a model that is too large."""
    if not mine:
        return (
            f"no layout of the {name} model is possible on these GPUs: none of the TP x PP x DP divides the model and "
            "--global-batch-size; change --nodes, or --global-batch-size to a multiple of the GPUs"
        )
    least = min(mine, key=lambda row: row.gib)
    return (
        f"the {name} model fits none of {len(mine)} layouts: the least is {least.layout} with {least.gib:.1f} GiB a "
        "GPU; take more --nodes, or a smaller --micro-batch-size or --seq-length"
    )


def nodes_needed(question: Question, kind: str, only: Layout | None = None) -> tuple[int, Row] | None:
    """The fewest nodes of the cluster on which some layout fits, and the fastest there; None: none does.

    The global batch is rounded up to what each number of nodes can share out, so that it refuses no number.
    """
    for nodes in range(1, question.cluster.max_nodes + 1):
        data = question.config.data
        gpus = nodes * question.cluster.gpus_per_node
        unit = gpus * data.micro_batch_size
        batch = -(-data.global_batch_size // unit) * unit
        shared = dataclasses.replace(data, global_batch_size=batch)
        asked = dataclasses.replace(question, config=dataclasses.replace(question.config, data=shared))
        every = layouts(asked.config, gpus, question.cluster.gpus_per_node)
        possible = [layout for layout, no in every if no is None]
        mine = [row(asked, layout, kind) for layout in possible if not only or matches(layout, only)]
        if any(candidate.fits for candidate in mine):
            return nodes, recommend(mine, kind, question.name(kind))[0]
    return None


def table(found: list[Row], tokens: int, name: str = "2:4") -> str:
    """The rows as text, the two kinds side by side, fastest sparse first; `name`: how the sparse kind is written."""
    pairs: dict[Layout, dict[str, Row]] = {}
    for entry in found:
        pairs.setdefault(entry.layout, {})[entry.kind] = entry
    lines = [
        f"{'layout':34}{'dense GiB':>11}{f'{name} GiB':>10}{'bubble':>9}{'dense s/step':>14}{f'{name} s/step':>12}"
        f"{f'{name} us/token':>14}"
    ]
    for layout, pair in sorted(pairs.items(), key=lambda item: item[1]["sparse"].seconds):
        dense, sparse = pair["dense"], pair["sparse"]
        marks = [f"{entry.gib:.1f}{' ' if entry.fits else '!'}" for entry in (dense, sparse)]
        lines.append(
            f"{layout!s:34}{marks[0]:>11}{marks[1]:>10}{100 * sparse.bubble:>8.1f}%{dense.seconds:>14.2f}"
            f"{sparse.seconds:>12.2f}{1e6 * sparse.seconds / tokens:>14.2f}{'' if sparse.refused is None else '  *'}"
        )
    lines.append("!: does not fit    *: this version of `slope pretrain` cannot run it yet")
    return "\n".join(lines)
