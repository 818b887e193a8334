"""Second moments of a dense weight that goes on from a pruned one.

N out, K in, C = K n/m kept per row. A place that was pruned has never had a gradient, and a second moment of 0 would
make AdamW's first steps there as large as they can be. The mean of its group's kept places says what to expect.
"""

import torch

from slope_megatron.sparsity.packing import unpack


def spread(kept_NC: torch.Tensor, mask_NK: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """`[N, K]`: the kept places' own second moments; elsewhere the mean of the n kept ones of the same m.

    Args:
        kept_NC: of the kept weights of each row, from left to right.
        mask_NK: bool, n True in every m.
    """
    means = kept_NC.unflatten(-1, (-1, n)).mean(-1)
    return torch.where(mask_NK, unpack(kept_NC, mask_NK), means.repeat_interleave(m, dim=-1))
