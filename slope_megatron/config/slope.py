"""SlopeConfig: what is sparse, how, and when the adapters join. Every field is a `--slope-*` flag and a YAML key."""

import dataclasses
import re

from slope_megatron.config.fields import check_choices, option


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
    """`"3"` -> blocks 3; `"3-5"` -> blocks 3, 4, 5.

    Raises:
        ValueError: not of that form.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise ValueError(f"{flag} holds {text!r}: blocks are written as `3` or `3-5`, counted from 0")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlopeConfig:
    """SLoPe's own settings (paper: arXiv 2405.16325). Read once; passed as an object from there on."""

    enabled: bool = option(True, "2:4 layers; --no-slope trains the dense twin with everything else the same")
    nm: str = option("2:4", "sparsity pattern N:M along the input dimension")
    nm_by_block: str = option(
        "", "other patterns for some blocks, counted from 0: `12-23=2:8` or `0=1:2,5-7=1:4`; later entries win"
    )
    dense_blocks: str = option("", "blocks that stay dense, counted from 0: `0,31` or `0-3`")
    pattern: str = option(
        "random",
        "row pattern: random (the paper's text) or magnitude of the initial weights",
        choices=("random", "magnitude"),
    )
    mode: str = option(
        "paper", "paper: sparse forward and dgrad, dense wgrad read at the kept places", choices=("paper",)
    )
    backward_mask_interval: int = option(
        100,
        "optimizer steps between two choices of the column pattern (second pruning); 0 keeps the first one",
    )
    init_rescale: bool = option(
        False, "multiply the initial kept weights by sqrt(M/N), which restores the dense variance"
    )
    lr_multiplier: float = option(1.0, "learning rate of the packed values over the base learning rate")
    adapter_rank: int = option(0, "rank r of the lazy low-rank adapters; 0: none")
    lazy_fraction: float = option(
        0.01, "share of the steps, at the end, in which the adapters train; 1.0: from the start"
    )
    adapter_lr_multiplier: float = option(1.0, "learning rate of the adapters over the base learning rate")
    dense_first_linear: bool = option(True, "keep the first linear after the input (layer 0's QKV) dense, as the paper")
    sparse_attention: bool = option(True, "make the attention's QKV and output projections sparse")
    sparse_mlp: bool = option(True, "make the MLP's linears sparse")
    backend: str = option("auto", "kernels of the sparse products", choices=("auto", "cusparselt", "reference"))

    def __post_init__(self):
        check_choices(self, "slope")
        parse_nm(self.nm)
        self.blocks()
        if self.backward_mask_interval < 0:
            raise ValueError(
                f"--slope-backward-mask-interval is {self.backward_mask_interval}: it must be 0 (never) "
                "or a number of steps"
            )
        if self.adapter_rank < 0:
            raise ValueError(
                f"--slope-adapter-rank is {self.adapter_rank}: it must be 0 (no adapters) or a positive rank"
            )
        if not 0.0 < self.lazy_fraction <= 1.0:
            raise ValueError(
                f"--slope-lazy-fraction is {self.lazy_fraction}: it must be in (0, 1]; for none: --slope-adapter-rank 0"
            )
        for name in ("lr_multiplier", "adapter_lr_multiplier"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--slope-{name.replace('_', '-')} is {getattr(self, name)}: it must be positive")
        if self.enabled and not (self.sparse_attention or self.sparse_mlp):
            raise ValueError(
                "neither attention nor MLP is sparse: leave one of them sparse, or say --no-slope for a dense run"
            )

    @property
    def n(self) -> int:
        """Weights kept in each group."""
        return parse_nm(self.nm)[0]

    @property
    def m(self) -> int:
        """Group size."""
        return parse_nm(self.nm)[1]

    def blocks(self) -> tuple[dict[int, str], set[int]]:
        """N:M of the blocks that have their own, and the blocks that stay dense.

        Raises:
            ValueError: text that is no such list.
        """
        own: dict[int, str] = {}
        for entry in filter(None, self.nm_by_block.split(",")):
            blocks, _, nm = entry.partition("=")
            parse_nm(nm)
            own.update(dict.fromkeys(parse_blocks(blocks, "--slope-nm-by-block"), nm))
        dense: set[int] = set()
        for entry in filter(None, self.dense_blocks.split(",")):
            dense.update(parse_blocks(entry, "--slope-dense-blocks"))
        return own, dense

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
