"""Config: the six parts together, the checks that need more than one of them, and where each value came from."""

import argparse
import dataclasses
import logging
import math
from pathlib import Path

from slope_megatron.config.fields import add_arguments, destination, load_yaml
from slope_megatron.config.model import ModelConfig
from slope_megatron.config.optimizer import OptimizerConfig
from slope_megatron.config.parallel import ParallelConfig
from slope_megatron.config.run import DataConfig, TrainConfig
from slope_megatron.config.scale import scale_values
from slope_megatron.config.shipped import config_file
from slope_megatron.config.slope import SlopeConfig, parse_nm
from slope_megatron.config.watch import WatchConfig

logger = logging.getLogger(__name__)
# Section of the YAML file -> (class, title in --help, prefix of its flags).
SECTIONS = {
    "slope": (SlopeConfig, "SLoPe: sparsity and adapters", "slope"),
    "model": (ModelConfig, "model", ""),
    "parallel": (ParallelConfig, "parallel layout", ""),
    "optimizer": (OptimizerConfig, "optimizer", ""),
    "data": (DataConfig, "data", ""),
    "train": (TrainConfig, "run", ""),
    "watch": (WatchConfig, "watchfulness and metrics", ""),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run's whole configuration."""

    slope: SlopeConfig = dataclasses.field(default_factory=SlopeConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)

    def __post_init__(self):
        object.__setattr__(self, "slope", self.slope.with_rank_for(self.model.hidden_size))
        check_shapes(self)
        if self.slope.enabled and not self.slope.packed and self.parallel.zero_stage == 3:
            raise ValueError(
                f"--slope-method {self.slope.method} with --zero-stage 3: its masks need whole weights between steps; "
                "use --zero-stage 1 or 2"
            )
        steps, warmup = self.train.steps, self.optimizer.warmup(self.train.steps)
        decay = self.optimizer.decay_steps(steps)
        if self.optimizer.lr_schedule == "wsd" and warmup + decay > steps:
            raise ValueError(
                f"--warmup-steps is {warmup} with --lr-schedule wsd, which decays in the last {decay} of {steps} "
                "steps: the two must fit into --steps; shorten the warm-up or lower --decay-fraction"
            )
        if self.slope.mup and self.optimizer.optimizer == "lamb":
            raise ValueError(
                "--slope-mup with --optimizer lamb: its trust ratios undo what a density does to the updates; use adamw"
            )
        layout = (self.parallel.tensor_parallel, self.parallel.pipeline_parallel, self.parallel.zero_stage)
        own_rank = layout == (1, 1, 1) and self.parallel.offload_optimizer == "none"
        if self.slope.enabled and self.slope.baseline and self.slope.baseline.swaps and not own_rank:
            raise ValueError(
                f"--slope-method {self.slope.method} is a simulation on one rank: leave --tensor-parallel, "
                "--pipeline-parallel, --zero-stage and --offload-optimizer at their defaults"
            )
        if self.slope.packed and self.slope.pattern == "wanda" and not self.train.init_from:
            raise ValueError(
                "--slope-pattern wanda prunes a trained model: give --init-from DENSE, or take random or magnitude"
            )
        steps, sparse = self.train.steps, self.slope.sparse_steps(self.train.steps)
        if self.slope.enabled and not sparse:
            raise ValueError(
                f"a dense start of {sparse.start} steps and a dense tail of {steps - sparse.stop} leave none of "
                f"{steps} steps sparse: take a smaller --slope-dense-start, --slope-dense-tail or (fst) "
                "--slope-fst-dense-tail, or say --no-slope for a dense run"
            )

    @property
    def dense_twin(self) -> "Config":
        """The same run of dense weights."""
        return dataclasses.replace(self, slope=dataclasses.replace(self.slope, enabled=False))

    def form_at(self, step: int) -> "Config":
        """What is trained in step `step`, counted from 0: this model, or its dense twin in a dense start or tail."""
        return self if step in self.slope.sparse_steps(self.train.steps) else self.dense_twin

    @property
    def switches(self) -> list[int]:
        """The steps, counted from 0, that train another form of the model than the one before."""
        sparse = self.slope.sparse_steps(self.train.steps) if self.slope.enabled else range(0)
        return [step for step in (sparse.start, sparse.stop) if 0 < step < self.train.steps]

    @property
    def adapter_start(self) -> int | None:
        """The step, counted from 0, at which the adapters join; None: never."""
        return self.slope.adapter_start(self.train.steps)

    def to_dict(self) -> dict[str, dict]:
        return dataclasses.asdict(self)


def check_shapes(config: Config) -> None:
    """Refuse a sharded width that is cut where the N:M groups or the bitmasks' bytes do not allow it."""
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_parallel
    divided = (
        ("--num-attention-heads", model.num_attention_heads, "--tensor-parallel", tp),
        ("--num-query-groups", model.query_groups, "--tensor-parallel", tp),
        ("--vocab-multiple", model.vocab_multiple, "--tensor-parallel", tp),
        ("--num-layers", model.num_layers, "--pipeline-parallel", parallel.pipeline_parallel),
        ("--seq-length", config.data.seq_length, "--tensor-parallel", tp if parallel.sequence_parallel else 1),
    )
    for flag, count, by, size in divided:
        if count % size:
            raise ValueError(f"{flag} is {count}: {by} {size} must divide it")
    if model.max_positions is not None and model.max_positions < config.data.seq_length:
        raise ValueError(
            f"--seq-length is {config.data.seq_length}: the model has {model.max_positions} positions "
            "(--max-positions); take a shorter sequence"
        )
    check_blocks(config)
    unit = packing_unit(config.slope)
    for flag, width in (("--hidden-size", model.hidden_size), ("--ffn-hidden-size", model.ffn)):
        if width % (unit * tp):
            nearest = max(1, round(width / (unit * tp))) * unit * tp
            rule = f"--tensor-parallel {tp} must divide it"
            if unit > 1:
                rule += f" and {config.slope.nm} groups with packed patterns need multiples of {unit} on each rank"
            raise ValueError(f"{flag} is {width}: {rule}; take {nearest}, say")


def check_blocks(config: Config) -> None:
    """Blocks that are named must exist, and one must stay sparse."""
    own, dense = config.slope.blocks()
    layers = config.model.num_layers
    for flag, blocks in (("--slope-nm-by-block", own), ("--slope-dense-blocks", dense)):
        if blocks and max(blocks) >= layers:
            raise ValueError(f"{flag} names block {max(blocks)}: the model has blocks 0 to {layers - 1}")
    if config.slope.enabled and len(dense) == layers:
        raise ValueError("--slope-dense-blocks names every block: leave one of them sparse, or say --no-slope")


def packing_unit(slope: SlopeConfig) -> int:
    """What the widths on one rank must be multiples of: a byte of the column pattern holds 8 kept weights."""
    if not slope.enabled:
        return 1
    if not slope.packed:  # masks are bitmasks of the dense width
        return math.lcm(8, *(m for _, m in map(parse_nm, slope.patterns)))
    return math.lcm(*(math.lcm(8 * m // math.gcd(8 * m, n), m) for n, m in map(parse_nm, slope.patterns)))


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of all sections, and `--config FILE` (repeatable; later files win, flags win over files)."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="YAML",
        help="configuration file, or `models/NAME` or `recipes/NAME` that come with this package; may be given more "
        "than once, later ones win",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=None,
        metavar="FLOAT",
        help="make what the configuration files say smaller, for a small machine: steps and batch by this factor, the "
        "model and the sequence by its root; what it does is logged, and flags still win",
    )
    for config_class, title, prefix in SECTIONS.values():
        add_arguments(parser, config_class, title, prefix)


def read_config(arguments: argparse.Namespace) -> tuple[Config, dict[str, str]]:
    """Defaults < YAML files (made smaller by `--scale`) < flags.

    Returns:
        the configuration, and for each `section.key` that is no default where it came from.
    Raises:
        ValueError: one sentence on the first thing that is wrong.
    """
    values: dict[str, dict] = {section: {} for section in SECTIONS}
    origins: dict[str, str] = {}
    classes = {section: config_class for section, (config_class, _, _) in SECTIONS.items()}
    for path in arguments.config:
        for section, content in load_yaml(config_file(Path(path)), classes).items():
            values[section].update(content)
            origins.update({f"{section}.{key}": path for key in content})
    given = vars(arguments)
    if given.get("scale") is not None:
        changed = scale_values(values, classes, arguments.scale)
        logger.info("--scale %s: %s", arguments.scale, "; ".join(changed) or "nothing changes")
        origins.update({line.split()[0]: f"--scale {arguments.scale}" for line in changed})
    for section, config_class in classes.items():
        for field in dataclasses.fields(config_class):
            name = destination(config_class, field.name)
            if name in given:
                values[section][field.name] = given[name]
                origins[f"{section}.{field.name}"] = "flag"
    return Config(**{section: classes[section](**content) for section, content in values.items()}), origins
