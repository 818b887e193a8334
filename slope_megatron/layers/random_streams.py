"""The random numbers of an unbiased gradient pruning, as a function of the step and the micro-batch.

A random word depends on (seed, weight's canonical name, step, micro-batch, output row in the whole weight, group of
tokens) alone: the same at every tensor-parallel size, with and without recomputation, and after a resume. A
micro-batch's tokens are those of Megatron's `[s, b, h]`, flattened: all of the sequence, under sequence parallelism
too.
"""

import dataclasses

import torch

from slope_megatron.sparsity import counter
from slope_megatron.sparsity.mvue_rng import MvueRng, as_int32, stream_table


class RngState:
    """Which micro-batch runs; one object for all layers of a model, moved by whoever runs the micro-batches.

    Args:
        micro_batch: number within the step, over all replicas.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.step = 0
        self.micro_batch = 0
        self._key: tuple[tuple, torch.Tensor] | None = None
        self._held: torch.Tensor | None = None

    def hold_key(self, device: torch.device) -> None:
        """From now on the key lies in one tensor, where a CUDA graph finds it, and `write_key` brings it up to date.

        Not for a pipeline, several of whose micro-batches are under way.
        """
        self._held = torch.zeros(2, dtype=torch.int32, device=device)

    def write_key(self) -> None:
        """The held key follows step and micro-batch; where none is held there is nothing to do."""
        if self._held is not None:
            self._held.copy_(self._words(self._held.device), non_blocking=True)

    def _words(self, device: torch.device) -> torch.Tensor:
        """The key of this micro-batch, where a copy to `device` does not wait."""
        words = as_int32(counter.key_of(self.seed, f"mvue:{self.step}:{self.micro_batch}"))
        return words.pin_memory() if device.type == "cuda" else words

    def key(self, device: torch.device) -> torch.Tensor:
        """The generator's key of this micro-batch, int32 `[2]` on `device`; a new tensor for each micro-batch, or
        the held one.

        A pipeline's earlier micro-batches still hold theirs. The copy to a GPU does not wait.
        """
        if self._held is not None:
            return self._held
        wanted = (self.step, self.micro_batch, device)
        if self._key is None or self._key[0] != wanted:
            self._key = (wanted, self._words(device).to(device, non_blocking=True))
        return self._key[1]

    def follow(self, output):
        """Hook a forward pass's output so that its backward pass runs with the number of the same micro-batch.

        Recomputation runs forwards inside backward, when a pipeline's next micro-batches have been through already.
        """
        micro_batch = self.micro_batch

        def go_back(_gradient) -> None:
            self.micro_batch = micro_batch

        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(go_back)
        return output


@dataclasses.dataclass
class RowStreams:
    """The random streams of one layer's outputs.

    Args:
        names: canonical name of each part of the rows (gate and up lie above each other).
        rows: for each part, its rows in the whole weight.
    """

    state: RngState
    names: tuple[str, ...]
    rows: tuple[range, ...]
    _streams: torch.Tensor | None = None

    def rng(self, n: int, m: int, device: torch.device) -> MvueRng:
        """The generator of the present micro-batch, n:m along the tokens."""
        if self._streams is None or self._streams.device != device:
            names = [counter.key_of(self.state.seed, name) for name in self.names]
            self._streams = stream_table(names, list(self.rows)).to(device)
        return MvueRng(self.state.key(device), self._streams, n, m)
