"""Generation with a key/value cache: a batch of prompts of any lengths, one new token each a step."""

import dataclasses
from collections.abc import Iterator

import torch

from slope_megatron.inference.decoder import Decoder
from slope_megatron.inference.sampling import next_tokens, uniform
from slope_megatron.inference.steps import Steps

# On a GPU each number of tokens has its own measured kernel choice: prompts are padded so that few occur.
PROMPT_UNIT = {"cuda": 64}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and how many at most."""

    max_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 1234

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(
                f"--temperature is {self.temperature}: it must be at least 0 (0 takes the likeliest token)"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p is {self.top_p}: it must be in (0, 1]; 1 draws from all tokens")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens is {self.max_tokens}: it must be at least 1")


def check_prompts(decoder: Decoder, prompts: list[list[int]], names: list[int]) -> None:
    """
    Raises:
        ValueError: no prompt, an empty one, one that fills the model's positions, or a token that it does not know.
    """
    if not prompts:
        raise ValueError("there is no prompt: give --prompt TEXT, or --prompts FILE with one in each line")
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            raise ValueError(f"prompt {name} is empty: the model needs at least one token to go on from")
        if len(prompt) >= decoder.max_positions:
            raise ValueError(
                f"prompt {name} has {len(prompt)} tokens and the model {decoder.max_positions} positions: shorten it"
            )
        if max(prompt) >= decoder.vocabulary:
            raise ValueError(
                f"prompt {name} has token {max(prompt)} and the model {decoder.vocabulary} entries: this tokenizer "
                "is not the model's; give its own"
            )


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    stop: int | None = None,
    first_prompt: int = 0,
) -> Iterator[tuple[int, int]]:
    """New tokens as they are drawn: (index of the prompt in `prompts`, token id).

    A prompt ends at token `stop` (not given out), at `max_tokens`, or where the model's positions end.

    Args:
        first_prompt: number of the first prompt; draws go by it, so that cutting prompts into batches changes nothing.
    """
    names = list(range(first_prompt, first_prompt + len(prompts)))
    check_prompts(decoder, prompts, names)
    lengths = [len(prompt) for prompt in prompts]
    unit = PROMPT_UNIT.get(decoder.device.type, 1)
    longest = -(-max(lengths) // unit) * unit
    cache = decoder.new_cache(
        len(prompts), max(longest, min(max(lengths) + sampling.max_tokens, decoder.max_positions))
    )
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    logits = decoder(torch.tensor(padded, device=decoder.device), cache=cache)
    last = logits[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
    running = dict.fromkeys(range(len(prompts)))
    positions = list(lengths)
    advance = Steps(decoder, cache, len(prompts))
    for step in range(sampling.max_tokens):
        draws = [uniform(sampling.seed, name, position) for name, position in zip(names, positions, strict=True)]
        tokens = next_tokens(last, sampling.temperature, sampling.top_p, draws)
        for row in list(running):
            if tokens[row] == stop:
                del running[row]
                continue
            yield row, tokens[row]
            if positions[row] + 1 >= decoder.max_positions:
                del running[row]
        if not running or step == sampling.max_tokens - 1:
            return
        last = advance(tokens, positions)
        for row in running:
            positions[row] += 1
