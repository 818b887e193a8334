"""Cached steps of a batch: one new token each, and on a GPU one CUDA graph for all of them.

A step of one token is many small kernels; asked for one by one they cost more than they compute. Shapes and memory stay
the same from step to step, only tokens and positions change, so the second step is captured and replayed from then on.
The first one runs as it is: it chooses kernels, which a capture must not.
"""

import torch

from slope_megatron.inference.decoder import Cache, Decoder


class Steps:
    """Callable: the next token of each row and its position -> logits `[b, V]`, valid until the next call."""

    def __init__(self, decoder: Decoder, cache: Cache, batch: int):
        self.decoder, self.cache = decoder, cache
        self.tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=decoder.device)
        self.positions_B1 = torch.zeros_like(self.tokens_B1)
        self.taken = 0
        # The captured step and where it leaves its logits.
        self.graph: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None

    def __call__(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        self.tokens_B1.copy_(torch.tensor(tokens)[:, None])
        # Rows that have ended go on in place: their tokens are not read, their slots are their own.
        self.positions_B1.copy_(torch.tensor(positions)[:, None].clamp(max=self.cache.slots - 1))
        if self.decoder.device.type == "cuda" and self.taken == 1:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits_BV = self.compute()
            self.graph = graph, logits_BV
        self.taken += 1
        if self.graph is None:
            return self.compute()
        graph, logits_BV = self.graph
        graph.replay()
        return logits_BV

    def compute(self) -> torch.Tensor:
        return self.decoder(self.tokens_B1, self.positions_B1, self.cache)[:, -1]
