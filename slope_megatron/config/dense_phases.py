"""The dense start and the dense tail of a sparse run: what their flags go with."""

from typing import TYPE_CHECKING

from slope_megatron.config.fields import Rule

if TYPE_CHECKING:
    from slope_megatron.config.slope import SlopeConfig

PART = Rule("it must be in [0, 1); to train dense: --no-slope", lambda value: 0 <= value < 1)


def check_dense_phases(slope: "SlopeConfig") -> None:
    """
    Raises:
        ValueError: with adapters, with swaps, or with a pattern that pruning at the end of a dense start would not
            have.
    """
    if not slope.enabled or not (slope.dense_start or slope.dense_tail):
        return
    flag = "--slope-dense-start" if slope.dense_start else "--slope-dense-tail"
    if slope.baseline and slope.baseline.swaps:
        raise ValueError(
            f"{flag} with --slope-method {slope.method}: its pruned places hold what no step has trained; leave one of "
            "the two out"
        )
    if slope.adapter_rank:
        raise ValueError(
            f"{flag} with --slope-adapter-rank {slope.adapter_rank}: lazy adapters join pruned weights, to the end; "
            "leave one of the two out"
        )
    if slope.dense_start and slope.pattern == "wanda":
        raise ValueError(
            "--slope-dense-start with --slope-pattern wanda: a dense start ends with pruning by magnitude; leave one "
            "of the two out"
        )
