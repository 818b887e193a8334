"""The baselines on dense weights under a mask: a row for each, which everything that differs between them is read from;
and what no method goes with.

The equations are in `layers.masked_weight`, the sources in docs/methods.md.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from slope_megatron.config.slope import SlopeConfig


class Baseline(NamedTuple):
    """One method.

    Args:
        title: its published name.
        mask: what chooses it: "magnitude" (N:M of the present weight, along K) or "transposable".
        gradient: what is read instead of dY: "exact", dY itself; "largest", dgrad and wgrad read the N largest of
            every M tokens; "estimate", wgrad reads an unbiased estimate.
        interval: the setting with the optimizer steps between two choices of the mask; empty: every step.
        decay: the setting with lambda of the decay of pruned weights; empty: there is none.
        attention: the setting without which the MLP alone is pruned, as published; empty: there is none.
        only_24: why it knows no other pattern than 2:4; empty: it does.
        swaps: whether pruned places are not trained, and now and then take the places of kept ones (`sparsity.swaps`).
        soft: whether b S(W), the scaled soft threshold (`sparsity.soft_threshold`), is multiplied instead of S W.
    """

    title: str
    mask: str
    gradient: str
    interval: str = ""
    decay: str = ""
    attention: str = ""
    only_24: str = ""
    soft: bool = False
    swaps: bool = False


BASELINES = {
    "srste": Baseline("SR-STE", "magnitude", "exact", decay="srste_decay"),
    "extended-srste": Baseline("Extended SR-STE", "magnitude", "largest", decay="srste_decay"),
    "fst": Baseline(
        *("FST", "transposable", "estimate"),
        interval="fst_mask_interval",
        decay="fst_decay",
        attention="fst_attention",
        only_24="its masks are transposable 2:4",
    ),
    "rigl": Baseline("RigL in groups of M", "magnitude", "exact", interval="swap_interval", swaps=True),
    "sste": Baseline(
        *("S-STE", "magnitude", "estimate"),
        attention="sste_attention",
        only_24="its threshold leaves two of four",
        soft=True,
    ),
}


def check_method(slope: "SlopeConfig") -> None:
    """Refuse settings that the method does not go with; `dense` and `--no-slope` are one thing."""
    if slope.method == "dense":
        object.__setattr__(slope, "enabled", False)
    if slope.mode == "full" and slope.method != "slope":
        raise ValueError(f"--slope-mode full with --slope-method {slope.method}: the mode is slope's; leave it out")
    if slope.fp8 != "off":
        check_fp8(slope)
    if slope.mup and slope.method not in ("slope", "dense"):
        raise ValueError(
            f"--slope-mup with --slope-method {slope.method}: it is for masks that never change; leave it out"
        )
    if slope.mup and slope.init_rescale:
        raise ValueError("--slope-mup and --slope-init-rescale are both given: the first includes the second; give one")
    if slope.baseline and slope.baseline.only_24 and (slope.nm != "2:4" or slope.nm_by_block):
        raise ValueError(
            f"--slope-method {slope.method} with another pattern than 2:4: {slope.baseline.only_24}; use 2:4"
        )
    if slope.method == "fst" and slope.adapter_rank:
        raise ValueError("--slope-method fst with --slope-adapter-rank: FST ends dense, without adapters; use 0")


def check_fp8(slope: "SlopeConfig") -> None:
    """Refuse what products in e4m3 do not go with: they need packed 2:4 weights and a dense wgrad."""
    if slope.method != "slope":
        raise ValueError(
            f"--slope-fp8 {slope.fp8} with --slope-method {slope.method}: it is slope's alone; leave it out"
        )
    if slope.mode == "full":
        raise ValueError(
            f"--slope-fp8 {slope.fp8} with --slope-mode full: its pruned wgrad has no e4m3 product; "
            "use --slope-mode paper"
        )
    if slope.nm != "2:4" or slope.nm_by_block:
        raise ValueError(
            f"--slope-fp8 {slope.fp8} with another pattern than 2:4: sparse tensor cores take no other; "
            "use --slope-nm 2:4"
        )
    if slope.backend == "cutlass":
        raise ValueError(
            f"--slope-fp8 {slope.fp8} with --slope-backend cutlass: its kernels take 16-bit values; "
            "use cusparselt or auto"
        )
