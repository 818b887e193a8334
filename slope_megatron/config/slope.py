"""SlopeConfig: what is sparse, how, and when the adapters join. Every field is a `--slope-*` flag and a YAML key."""

import dataclasses
import re

from slope_megatron.config.dense_phases import PART, check_dense_phases
from slope_megatron.config.fields import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Rule, check_fields, option
from slope_megatron.config.methods import BASELINES, Baseline, check_method

# Libraries of 2:4 kernels: each is the module `slope_megatron.ops.operands.NAME`.
LIBRARIES = ("cusparselt", "cutlass")
BACKENDS = ("auto", *LIBRARIES, "reference")


def parse_nm(text: str) -> tuple[int, int]:
    """`"2:4"` -> (2, 4): keep N of every M consecutive weights.

    Raises:
        ValueError: not of that form, or not 1 <= N < M with M 2, 4 or 8.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    n, m = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= n < m or m not in (2, 4, 8):
        raise ValueError(
            f"--slope-nm is {text!r}: it must be N:M with 1 <= N < M and M one of 2, 4, 8; "
            "use 2:4, which runs on sparse tensor cores (1:2, 1:4 and 2:8 are the others tested)"
        )
    return n, m


def parse_blocks(text: str, flag: str) -> range:
    """`"3"` -> block 3; `"3-5"` -> blocks 3, 4, 5."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise ValueError(f"{flag} holds {text!r}: blocks are written as `3` or `3-5`, counted from 0")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def parse_rank(rank: int | str) -> int | str:
    """`16`, `"16"` -> 16; `"1.56%"` stays, until the hidden size is known.

    Raises:
        ValueError: neither a whole number >= 0 nor a percentage of at most 100.
    """
    text = str(rank).strip()
    if re.fullmatch(r"\d+", text) and not isinstance(rank, bool):
        return int(text)
    if isinstance(rank, str) and re.fullmatch(r"\d+(\.\d+)?%", text) and 0.0 < float(text[:-1]) <= 100.0:
        return text
    raise ValueError(
        f"--slope-adapter-rank is {rank!r}: it must be 0 (no adapters), a positive rank such as 16, or a percentage of "
        "the hidden size such as 1.56%"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlopeConfig:
    """SLoPe's own settings (paper: arXiv 2405.16325). Read once; passed as an object from there on."""

    enabled: bool = option(True, "2:4 layers; --no-slope trains the dense baseline with everything else the same")
    nm: str = option("2:4", "sparsity pattern N:M along the input dimension")
    nm_by_block: str = option(
        "", "other patterns for some blocks, counted from 0: `12-23=2:8` or `0=1:2,5-7=1:4`; later entries win"
    )
    dense_blocks: str = option("", "blocks that stay dense, counted from 0: `0,31` or `0-3`")
    pattern: str = option(
        "random",
        "row pattern: random (the paper's text), magnitude of the initial weights, or wanda (magnitude x input norm of "
        "the model given by --init-from)",
        choices=("random", "magnitude", "wanda"),
    )
    mode: str = option(
        "paper",
        "paper: sparse forward and dgrad, dense wgrad read at the kept indices; full: wgrad reads an unbiased 2:4 "
        "estimate of the output gradient, on sparse tensor cores too",
        choices=("paper", "full"),
    )
    token_groups: str = option(
        "batch",
        "what is neighbours where an output gradient is pruned along tokens (full, extended-srste, fst, sste): batch, "
        "the same position of a micro-batch's samples, as they lie in memory; sequence, adjacent tokens of one sample "
        "(of one sample a micro-batch both are this)",
        choices=("batch", "sequence"),
    )
    method: str = option(
        "slope",
        "slope: packed 2:4 weights; or a baseline in the same trainer, on dense weights: srste (SR-STE: dynamic masks, "
        "exact gradients), extended-srste (the same with pruned, biased gradients), fst (transposable masks, MLP "
        "only), sste (soft threshold, MLP only), rigl (a simulation of dynamic patterns, on one rank), dense (the same "
        "as --no-slope)",
        choices=("slope", "dense", *BASELINES),
    )
    backward_mask_interval: int = option(
        100,
        "optimizer steps between two choices of the column pattern (second pruning); 0 keeps the first one",
        must=Rule("it must be 0 (never) or a number of steps", lambda value: value >= 0),
    )
    init_rescale: bool = option(
        False, "multiply the initial kept weights by sqrt(M/N), which restores the dense variance"
    )
    mup: bool = option(
        False,
        "SmuPar, maximal-update parametrisation of sparse weights: with D = N/M their initial values times 1/sqrt(D), "
        "their learning rate times 1/D and their weight decay times D, so that a dense model's learning rate serves; "
        "after a dense start the latter two alone",
    )
    lr_multiplier: float = option(1.0, "learning rate of the packed values over the base learning rate", must=POSITIVE)
    wanda_samples: int = option(
        128, "training samples that --slope-pattern wanda measures the inputs' norms on", must=COUNT
    )
    adapter_rank: int | str = option(
        0, "rank r of the lazy low-rank adapters, or a percentage of the hidden size: 16 or 1.56%; 0: none"
    )
    lazy_fraction: float = option(
        0.01,
        "share of the steps, at the end, in which the adapters train; 1.0: from the start",
        must=Rule("it must be in (0, 1]; for none: --slope-adapter-rank 0", lambda value: 0 < value <= 1),
    )
    adapter_lr_multiplier: float = option(
        1.0, "learning rate of the adapters over the base learning rate", must=POSITIVE
    )
    dense_first_linear: bool = option(True, "keep the first linear after the input (layer 0's QKV) dense, as the paper")
    sparse_attention: bool = option(True, "make the attention's QKV and output projections sparse")
    sparse_mlp: bool = option(True, "make the MLP's linears sparse")
    srste_decay: float = option(
        6e-6, "srste, extended-srste: lambda of the decay of pruned weights, added to the gradient", must=NOT_NEGATIVE
    )
    fst_decay: float = option(
        6e-5, "fst: the same, its published value for 124M and 774M parameters", must=NOT_NEGATIVE
    )
    fst_mask_interval: int = option(
        40, "fst: optimizer steps between two searches of the transposable masks", must=COUNT
    )
    fst_dense_tail: float = option(1 / 6, "fst: --slope-dense-tail where that is unset, as published", must=PART)
    dense_start: float = option(
        0.0,
        "share of the steps, at the beginning, that train dense weights; they are then pruned by magnitude",
        must=PART,
    )
    dense_tail: float | None = option(
        None, "share of the steps, at the end, that train dense weights; unset: fst's, else none", must=PART
    )
    fst_attention: bool = option(False, "fst: prune the attention's linears too; as published, the MLP's alone")
    swap_interval: int = option(50, "rigl: optimizer steps between two swaps of kept and pruned places", must=COUNT)
    swap_share: float = option(
        0.3, "rigl: share of the groups that swap at first; it falls as a cosine until 3/4 of the steps", must=SHARE
    )
    swap_rule: str = option(
        "gradient",
        "rigl: which groups swap, and what grows there: gradient (the largest pruned ones), magnitude (where the "
        "smallest weights are; grown by gradient), random",
        choices=("gradient", "magnitude", "random"),
    )
    sste_attention: bool = option(False, "sste: prune the attention's linears too; as published, the MLP's alone")
    backend: str = option("auto", "kernels of the sparse products", choices=BACKENDS)
    fp8: str = option(
        "off",
        "products of the sparse linears in e4m3 (sm_89, sm_90), one scale a tensor: off (the parameters' own type), or "
        "current (scales from each tensor's present largest magnitude)",
        choices=("off", "current"),
    )
    fp8_wgrad: bool = option(True, "with --slope-fp8, the weight gradient's product in e4m3 as well")

    def __post_init__(self):
        check_fields(self, "slope")
        parse_nm(self.nm)
        self.blocks()
        object.__setattr__(self, "adapter_rank", parse_rank(self.adapter_rank))
        check_method(self)
        check_dense_phases(self)
        if self.enabled and not (self.prunes_attention or self.sparse_mlp):
            raise ValueError(
                "neither attention nor MLP is sparse: leave one of them sparse, or say --no-slope for a dense run"
            )

    @property
    def baseline(self) -> Baseline | None:
        """The method's row where the sparse linears hold dense weights under a mask; None: they do not."""
        return BASELINES.get(self.method)

    @property
    def packed(self) -> bool:
        """Whether the sparse linears hold packed values."""
        return self.enabled and self.method == "slope"

    @property
    def prunes_attention(self) -> bool:
        """Whether the attention's linears are pruned: where asked for; twice, if the MLP's alone are as published."""
        own = self.baseline and self.baseline.attention
        return self.sparse_attention and (not own or getattr(self, own))

    def sparse_steps(self, steps: int) -> range:
        """Those of `steps`, counted from 0, between the dense start and the dense tail."""
        tail = self.dense_tail
        if tail is None:
            tail = self.fst_dense_tail if self.method == "fst" else 0.0
        return range(int(self.dense_start * steps + 1e-9), int((1.0 - tail) * steps + 1e-9))

    def adapter_start(self, steps: int) -> int | None:
        """The step of `steps`, counted from 0, at which the adapters join: floor((1 - f) T); None: never."""
        if not self.enabled or not self.adapter_rank:
            return None
        return int((1.0 - self.lazy_fraction) * steps + 1e-9)

    def adapters_count(self, steps: int, done: int) -> bool:
        """Whether the weights after `done` of `steps` steps are to be multiplied with their adapters.

        Until they have trained R is zero, but in a run that began with those of another one.
        """
        start = self.adapter_start(steps)
        return start is not None and (done > start or start == 0)

    @property
    def rank(self) -> int:
        """Rank of the adapters; 0: none.

        Raises:
            ValueError: it is a percentage still: see `with_rank_for`.
        """
        if isinstance(self.adapter_rank, str):
            raise ValueError(
                f"--slope-adapter-rank is {self.adapter_rank} of a hidden size that is not known here: call "
                "with_rank_for(hidden_size) first"
            )
        return self.adapter_rank

    @property
    def gradient_nm(self) -> tuple[int, int]:
        """N and M of an output gradient along tokens: what sparse tensor cores take, whatever N:M the weight has."""
        return (1, 2) if self.nm == "1:2" else (2, 4)

    @property
    def float8_kinds(self) -> tuple[str, ...]:
        """The products of a sparse linear that are in e4m3."""
        if self.fp8 == "off":
            return ()
        return ("forward", "dgrad", "wgrad") if self.fp8_wgrad else ("forward", "dgrad")

    @property
    def decay(self) -> float:
        """lambda of a baseline's decay of pruned weights."""
        return getattr(self, self.baseline.decay) if self.baseline and self.baseline.decay else 0.0

    @property
    def mask_interval(self) -> int:
        """Optimizer steps between two choices of a baseline's masks."""
        return getattr(self, self.baseline.interval) if self.baseline and self.baseline.interval else 1

    @property
    def initial_scale(self) -> float:
        """What the initial values of packed weights are multiplied with."""
        return (self.m / self.n) ** 0.5 if self.init_rescale or self.mup else 1.0

    @property
    def n(self) -> int:
        """Weights kept in each group."""
        return parse_nm(self.nm)[0]

    @property
    def m(self) -> int:
        """Group size."""
        return parse_nm(self.nm)[1]

    @property
    def patterns(self) -> set[str]:
        """N:M of all blocks."""
        return {self.nm, *self.blocks()[0].values()}

    def blocks(self) -> tuple[dict[int, str], set[int]]:
        """N:M of the blocks that have their own, and the blocks that stay dense."""
        own: dict[int, str] = {}
        for entry in filter(None, self.nm_by_block.split(",")):
            blocks, _, nm = entry.partition("=")
            parse_nm(nm)
            own.update(dict.fromkeys(parse_blocks(blocks, "--slope-nm-by-block"), nm))
        dense: set[int] = set()
        for entry in filter(None, self.dense_blocks.split(",")):
            dense.update(parse_blocks(entry, "--slope-dense-blocks"))
        return own, dense

    def with_rank_for(self, hidden_size: int) -> "SlopeConfig":
        """A percentage as the rank that it means: the nearest whole number, at least 1."""
        if not isinstance(self.adapter_rank, str):
            return self
        percent = float(self.adapter_rank.rstrip("%"))
        return dataclasses.replace(self, adapter_rank=max(1, round(hidden_size * percent / 100.0)))

    def for_block(self, block: int) -> "SlopeConfig":
        """The settings of one block (counted from 0 over all stages): its N:M, or dense."""
        own, dense = self.blocks()
        return dataclasses.replace(
            self,
            enabled=self.enabled and block not in dense,
            nm=own.get(block, self.nm),
            nm_by_block="",
            dense_blocks="",
        )
