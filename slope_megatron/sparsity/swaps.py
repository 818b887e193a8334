"""Dynamic N:M patterns: in some groups of a row's M weights, one that is kept changes places with one that is not.

N out, K in; S is the mask, G the dense gradient of S W. In each group

    dropped   the kept weight of the smallest |W|
    grown     the pruned place of the largest |G|; by the rule `random` any of them

and the groups that swap are a share of each weight's, by rule

    gradient    those of the largest |G| at the grown place (RigL, arXiv 1911.11134, in groups)
    magnitude   those of the smallest |W| at the dropped one
    random      any (SET, arXiv 1707.04780, in groups)

The share decays as a cosine, to nothing at three quarters of the steps.
"""

import math
from typing import NamedTuple

import torch

RULES = ("gradient", "magnitude", "random")
# Of the steps, after which patterns stay.
ENDS = 0.75


class Swaps(NamedTuple):
    """Places in the flattened weight, int64, one of each a swap."""

    dropped: torch.Tensor
    grown: torch.Tensor


def share_at(step: int, steps: int, share: float) -> float:
    """The share of the groups that swap in step `step`, counted from 0."""
    progress = step / (ENDS * steps)
    return 0.5 * share * (1.0 + math.cos(math.pi * progress)) if progress < 1.0 else 0.0


def choose_swaps(
    weight_NK: torch.Tensor,
    mask_NK: torch.Tensor,
    gradient_NK: torch.Tensor,
    m: int,
    share: float,
    rule: str,
    generator: torch.Generator,
) -> Swaps:
    """What swaps now; of equal scores the earlier group, and the earlier place.

    Args:
        mask_NK: bool; N of every M are True.
        gradient_NK: read at pruned places alone.
        generator: on the CPU; used by the rule `random`.
    """
    mask = mask_NK.unflatten(-1, (-1, m)).flatten(0, -2)
    magnitude = weight_NK.abs().reshape(mask.shape).masked_fill(~mask, math.inf)
    wanted = gradient_NK.abs().reshape(mask.shape)
    if rule == "random":
        wanted = torch.rand(mask.shape, generator=generator).to(mask.device)
    smallest, dropped = magnitude.min(-1)
    largest, grown = wanted.masked_fill(mask, -math.inf).max(-1)
    scores = {"gradient": largest, "magnitude": -smallest, "random": largest}[rule]
    groups = scores.argsort(descending=True, stable=True)[: round(share * len(scores))]
    return Swaps(groups * m + dropped[groups], groups * m + grown[groups])


def swap_mask(mask_NK: torch.Tensor, swaps: Swaps) -> torch.Tensor:
    """The new mask, bool `[N, K]`."""
    flat = mask_NK.flatten().clone()
    flat[swaps.dropped], flat[swaps.grown] = False, True
    return flat.view_as(mask_NK)


def swap_state(swaps: Swaps, masters: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """Give the grown places of flat fp32 state their start: weight and first moment 0, the dropped one's second moment.

    With a second moment of 0 under an old step count, Adam's first update of it would be several learning rates.
    """
    second[swaps.grown] = second[swaps.dropped]
    for tensor in (masters, first):
        tensor[swaps.grown] = 0.0
        tensor[swaps.dropped] = 0.0
    second[swaps.dropped] = 0.0
