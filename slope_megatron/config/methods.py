"""The baselines on dense weights under a mask: a row for each, which everything that differs between them is read from.

The equations are in `layers.masked_weight`, the sources in docs/methods.md.
"""

from typing import NamedTuple


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
    "sste": Baseline(
        *("S-STE", "magnitude", "estimate"),
        attention="sste_attention",
        only_24="its threshold leaves two of four",
        soft=True,
    ),
}
