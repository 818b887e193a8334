"""Draws: against the distribution they claim, and reproducible."""

import pytest
import torch

from slope_megatron.inference.generate import Sampling
from slope_megatron.inference.sampling import next_tokens, uniform


def test_greedy_takes_the_first_of_the_likeliest():
    assert next_tokens(torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 2.0, 3.0, 0.0]]), 0.0, 1.0, [0.9, 0.1]) == [1, 0]


def test_the_share_of_each_token_is_its_probability():
    """Draws on a fine grid: every token is taken on an interval of the length of its probability."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    draws = (torch.arange(4000) + 0.5) / 4000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        taken = torch.tensor(next_tokens(logits.expand(4000, 4), temperature, top_p, draws.tolist()))
        found = torch.bincount(taken, minlength=4) / 4000
        expected = torch.softmax(logits / temperature, -1)
        if top_p == 0.8:
            # 0.73 and 0.13 pass 0.8; the others are out.
            expected = torch.where(expected >= expected.sort(descending=True).values[1], expected, torch.zeros(4))
            expected = expected / expected.sum()
        assert torch.allclose(found, expected, atol=2 / 4000)


def test_the_likeliest_token_is_always_in():
    assert next_tokens(torch.tensor([[9.0, 0.0]]), 1.0, 1e-6, [0.999999]) == [0]


def test_no_temperature_is_too_low():
    """1e-310 times ordinary logits is beyond fp64."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -2.0, 3.0]])
    assert next_tokens(logits, 1e-310, 0.9, [0.3, 0.9]) == next_tokens(logits, 0.0, 0.9, [0.3, 0.9]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_one_sentence(temperature, wrong):
    logits = torch.zeros(2, 5)
    logits[1, 3] = wrong
    with pytest.raises(ValueError, match="logits are not finite"):
        next_tokens(logits, temperature, 0.9, [0.5, 0.5])
    assert next_tokens(torch.tensor([[-float("inf"), 1.0]]), temperature, 0.9, [0.5]) == [1]


def test_uniforms_depend_on_seed_prompt_and_position_alone():
    values = {uniform(seed, prompt, place) for seed in range(4) for prompt in range(4) for place in range(16)}
    assert len(values) == 256 and all(0 < value < 1 for value in values)
    assert abs(sum(values) / 256 - 0.5) < 0.06  # three standard deviations
    assert uniform(1, 2, 3) == uniform(1, 2, 3)


@pytest.mark.parametrize(("temperature", "top_p", "message"), [(-1, 1, "temperature is -1"), (1, 0, "top-p is 0")])
def test_out_of_range(temperature, top_p, message):
    with pytest.raises(ValueError, match=message):
        Sampling(temperature=temperature, top_p=top_p)
