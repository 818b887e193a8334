"""Greedy answers, and whether another model would have given them: up to near ties, which rounding may turn."""

import torch


def answers(folder, prompts: list[str], tokens: int, **how) -> list[list[int]]:
    """The tokens that a run or a packed export answers with, all prompts in one batch; `how`: of `open_decoder`."""
    from slope_megatron.evaluation.models import open_decoder
    from slope_megatron.inference.generate import Sampling, generate

    decoder, text = open_decoder(folder, **how)
    found: list[list[int]] = [[] for _ in prompts]
    encoded = [text.encode(prompt) for prompt in prompts]
    for row, token in generate(decoder, encoded, Sampling(tokens, temperature=0.0), text.eod):
        found[row].append(token)
    return found


@torch.no_grad()
def shortfall(model, prompts: list[list[int]], found: list[list[int]]) -> float:
    """By how much, at most, the logit of an answer's token is below the largest one of `model`, of transformers."""
    worst = 0.0
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        worst = max([worst, *(logits.amax(1) - chosen).tolist()])
    return worst
