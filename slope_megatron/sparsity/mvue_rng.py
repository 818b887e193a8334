"""The random words behind an unbiased estimate of dY: one for each group of tokens of each output.

T tokens, N out (this rank's rows), groups of m tokens. The word of output n and group g is word r G + g of the counter
generator, r the output's row in the whole weight and G = ceil(T / m) the groups of the micro-batch. The generator's key
is a hash of (seed, step, micro-batch) and its stream the weight's name, so one key of two words serves all layers, and
what is particular to a layer never changes.
"""

import dataclasses

import torch

from slope_megatron.sparsity import counter
from slope_megatron.sparsity.mvue import mvue
from slope_megatron.sparsity.tokens import along_tokens

# Of the counter generator: drawing costs a kernel time in every micro-batch, and these still pass every test.
ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class MvueRng:
    """The random words of one layer in one micro-batch.

    Args:
        key: int32 `[2]`, on the device of dY: a captured CUDA graph reads what it holds at the replay.
        streams: int32 `[3, 2, N/2]`, from `stream_table`.
        n, m: of the estimate, along the tokens.
    """

    key: torch.Tensor
    streams: torch.Tensor
    n: int
    m: int

    def words(self, groups: int) -> torch.Tensor:
        """int64 `[N, groups]`, each in [0, 2^32)."""
        key = self.key.long() & counter.MASK32
        # Back to one column an output.
        *name, rows = (self.streams.transpose(1, 2).flatten(1).long() & counter.MASK32).unbind()
        return counter.bits_of_rows((key[0], key[1]), rows, groups, tuple(word[:, None] for word in name), ROUNDS)

    def estimate(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """The estimate of dY, `[T, N]`: n:m along T."""
        words = self.words(-(-dy_TN.shape[0] // self.m))
        return along_tokens(dy_TN, self.m, lambda dy_NT: mvue(dy_NT, words, self.n, self.m))


def as_int32(words) -> torch.Tensor:
    """32-bit words in [0, 2^32) as the int32 of the same bits."""
    return torch.as_tensor(words, dtype=torch.int64).to(torch.int32)


def stream_table(names: list[tuple[int, int]], rows: list[range]) -> torch.Tensor:
    """Who each output is: two words of its weight's name, and its row in the whole weight, int32 `[3, 2, N/2]`.

    Outputs come in pairs, as a kernel reads them: all the even ones, then all the odd ones.

    Args:
        names, rows: of each part of the outputs (gate and up lie above each other).
    """
    table = torch.cat(
        [
            torch.stack((*(torch.full((len(part),), word) for word in name), torch.arange(part.start, part.stop)))
            for name, part in zip(names, rows, strict=True)
        ],
        dim=1,
    )
    return as_int32(table).unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
