"""Megatron's distributed optimizer gathers weights in the next forward: what is made of them waits for that."""

import dataclasses

import pytest
import torch

from helpers.megatron_training import Host, Outcome, train

pytestmark = pytest.mark.slow
SLOPE = {"backward_mask_interval": 2}
DISTRIBUTED = Host(distributed_optimizer=True, overlap_grad_reduce=True, slope=SLOPE, look_at=(2, 3, 4))


def as_without_overlap(ranks, host: Host) -> Outcome:
    """What a rank of two saw with overlap, which is what it sees without, to the bit."""
    plain = ranks.run(train, host, world=2)
    late = ranks.run(train, dataclasses.replace(host, overlap_param_gather=True), world=2)
    for expected, found in zip(plain, late, strict=True):
        assert found.losses == expected.losses and found.evaluations == expected.evaluations
        for before, after in zip(expected.states, found.states, strict=True):
            assert before and before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
    assert late[0].losses[-1] < late[0].losses[0] - 0.5
    return late[0]


def test_losses_evaluations_and_states(ranks):
    first, second, third = as_without_overlap(ranks, DISTRIBUTED).states
    assert len(third) == 15, "the second prunings"
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in third), "chosen anew after the fourth step"


def test_adapters_that_join_in_the_fourth_step(ranks):
    slope = {**SLOPE, "adapter_rank": 4, "lazy_fraction": 0.34}
    states = as_without_overlap(ranks, dataclasses.replace(DISTRIBUTED, bf16=True, slope=slope)).states
    trained = [{bool(value.any()) for name, value in state.items() if name.endswith("adapter_r")} for state in states]
    assert trained == [{False}, {False}, {True}]
