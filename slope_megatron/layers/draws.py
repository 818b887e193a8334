"""Draws: the random numbers of an unbiased gradient pruning, as a function of the place in the run.

A word depends on (seed, weight's canonical name, step, micro-batch, output row in the whole weight, group of tokens)
alone: the same at every tensor-parallel size, with and without recomputation, and after a resume. A micro-batch's
tokens are those of Megatron's `[s, b, h]`, flattened: the whole sequence, also under sequence parallelism.
"""

import dataclasses

import torch

from slope_megatron.sparsity import counter
from slope_megatron.sparsity.mvue import mvue
from slope_megatron.sparsity.tokens import along_tokens


class Draws:
    """Where training is; one object for all layers of a model, moved by whoever runs the micro-batches.

    Args:
        micro_batch: number within the step, over all replicas.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.step = 0
        self.micro_batch = 0

    def follow(self, output):
        """Return a forward pass's output so marked that its backward pass stands at the same micro-batch.

        Recomputation runs forwards inside backward, when a pipeline's next micro-batches have been through already.
        """
        micro_batch = self.micro_batch

        def go_back(_gradient) -> None:
            self.micro_batch = micro_batch

        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(go_back)
        return output


@dataclasses.dataclass(frozen=True)
class RowDraws:
    """The draws of one layer's outputs.

    Args:
        names: canonical name of each part of the rows (gate and up lie above each other).
        rows: for each part, its rows in the whole weight.
    """

    draws: Draws
    names: tuple[str, ...]
    rows: tuple[range, ...]

    def pruning(self, n: int, m: int):
        """The estimator for the present step and micro-batch, dY `[T, N]` -> `[T, N]`, n:m along T."""
        place = f"mvue:{self.draws.step}:{self.draws.micro_batch}"
        keys = [counter.key_of(self.draws.seed, f"{name}:{place}") for name in self.names]

        def prune(dy_TN: torch.Tensor) -> torch.Tensor:
            groups = -(-dy_TN.shape[0] // m)
            words = [
                counter.bits(key, rows, range(groups), groups, dy_TN.device)
                for key, rows in zip(keys, self.rows, strict=True)
            ]
            return along_tokens(dy_TN, m, lambda dy_NT: mvue(dy_NT, torch.cat(words), n, m))

        return prune
