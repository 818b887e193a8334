"""SlopeLM: this project's decoder as a model of lm-evaluation-harness. Imported where `lm_eval` is installed."""

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from slope_megatron.inference.decoder import Decoder
from slope_megatron.inference.generate import Sampling, generate
from slope_megatron.inference.text import TextTokenizer


class SlopeLM(TemplateLM):
    """Log-likelihoods and greedy text of a Decoder. Prompts that are too long lose their beginning, as in the harness's
    own Hugging Face model."""

    def __init__(self, decoder: Decoder, tokenizer: TextTokenizer, batch_size: int = 8, max_tokens: int = 256):
        super().__init__()
        self.decoder, self.text = decoder, tokenizer
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.eod = tokenizer.eod

    @property
    def eot_token_id(self) -> int:
        return self.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.text.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        longest = self.decoder.max_positions
        rows = [(context + continuation)[-(longest + 1) :] for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for first in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm, desc="likelihoods"):
            part = order[first : first + self.batch_size]
            width = len(rows[part[0]]) - 1
            tokens = torch.tensor([rows[index][:-1] + [0] * (width + 1 - len(rows[index])) for index in part])
            logits = self.decoder(tokens.to(self.decoder.device))
            for row, index in zip(logits, part, strict=True):
                continuation = torch.tensor(requests[index][2][-longest:], device=row.device)
                end = len(rows[index]) - 1
                shares = torch.log_softmax(row[end - len(continuation) : end].float(), dim=-1)
                found = shares.gather(-1, continuation[:, None]).sum()
                results[index] = (float(found), bool((shares.argmax(-1) == continuation).all()))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.decoder.max_positions,
                context_len=1,
            )
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(found for found, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generating"):
            context, asked = request.args
            # Tasks name the same thing in several ways, and one stop need not be a list.
            options = normalize_gen_kwargs(asked, self.max_tokens)
            until, count = [stop for stop in options["until"] if stop], options["max_gen_toks"]
            if options["do_sample"] and options.get("temperature", 0.0) > 0:
                raise ValueError("a task asks for sampled text: this model answers greedily; choose another task")
            prompt = self.tok_encode(context)[-max(1, self.decoder.max_positions - count) :] or [self.prefix_token_id]
            drawn: list[int] = []
            text = ""
            for _, token in generate(self.decoder, [prompt], Sampling(count, temperature=0.0), self.eot_token_id):
                drawn.append(token)
                text = self.text.decode(prompt + drawn)[len(self.text.decode(prompt)) :]
                if any(stop in text for stop in until):
                    break
            answers.append(cut(text, until))
        return answers


def cut(text: str, until: list[str]) -> str:
    """`text` up to the first of the stops."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]
