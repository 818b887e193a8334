"""The next token from logits: greedy, or drawn with temperature and top-p. A draw depends on (seed, prompt, position)
alone: not on the batch that a prompt is in, nor on the machine's generators."""

import torch

from slope_megatron.sparsity import counter


def uniform(seed: int, prompt: int, position: int) -> float:
    """In (0, 1), from the counter generator."""
    word = counter.philox(counter.key_of(seed, f"sample.{prompt}"), torch.tensor([position], dtype=torch.int64))[0, 0]
    return (int(word) + 0.5) * 2.0**-32


def next_tokens(logits_BV: torch.Tensor, temperature: float, top_p: float, draws: list[float]) -> list[int]:
    """One token id for each row, with one wait for the device.

    Args:
        logits_BV: of each prompt.
        temperature: 0 takes the likeliest token (of equal ones the first).
        top_p: the draw is from the likeliest tokens that together have at least this probability.
        draws: uniform in (0, 1): where in their distribution function to look.
    Raises:
        ValueError: a row whose largest logit is not finite.
    """
    largest = logits_BV.amax(-1, keepdim=True)
    if temperature == 0:
        tokens = logits_BV.argmax(-1)
    else:
        # Divided after the largest one is taken off, so that no temperature is too low.
        below = (logits_BV.double() - largest.double()) / temperature
        shares, order = torch.softmax(below, dim=-1).sort(descending=True, stable=True)
        total = shares.cumsum(-1)
        # A token is in if those before it do not reach top_p yet: the likeliest one always is.
        inside = (total - shares < top_p).sum(-1, keepdim=True).clamp(min=1)
        aims = torch.tensor(draws, dtype=torch.float64, device=total.device)[:, None] * total.gather(1, inside - 1)
        at = torch.searchsorted(total, aims).minimum(inside - 1)
        tokens = order.gather(1, at)[:, 0]
    found = torch.where(largest[:, 0].isfinite(), tokens, -1).tolist()
    if -1 in found:
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or their type is too narrow for its numbers; "
            "try --dtype fp32, or another checkpoint"
        )
    return found
