"""The registered op of low-rank adapters in a sparse operand (`operands.augmented`).

T tokens, S in, P rank, D [P, S] the first factor.
    slope::join_input       H [T, P] = scale X D^T, and X' = [X | H 0 | H 0]
On CUDA it runs `slope_kernels`; on a CPU plain torch.
"""

import torch

# Below these tokens, a kernel whose programs each hold the whole rank of some tokens leaves most of a GPU idle.
FEW_TOKENS = 2048


@torch.library.custom_op("slope::join_input", mutates_args=(), device_types="cuda")
def join_input(
    x_TS: torch.Tensor, down_PS: torch.Tensor, padded: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """H `[T, P]` = scale X D^T, the scale applied to the fp32 sums, and X' `[T, S + 2 padded]` = [X | H 0 | H 0]."""
    from slope_kernels.triton import low_rank

    tokens, columns = x_TS.shape
    rank = down_PS.shape[0]
    hidden_TP = x_TS.new_empty((tokens, rank))
    if rank > low_rank.MOST_RANK or tokens < FEW_TOKENS:
        # With beta 0 nothing is read of what the new tensor holds.
        hidden_TP.addmm_(x_TS, down_PS.t(), beta=0, alpha=scale)
        return hidden_TP, _joined_parts(x_TS, hidden_TP, padded)
    x_TS = x_TS if x_TS.stride(1) == 1 else x_TS.contiguous()
    joined = x_TS.new_empty((tokens, columns + 2 * padded))
    low_rank.down(x_TS, down_PS, hidden_TP, joined, padded=padded, scale=scale)
    return hidden_TP, joined


def _joined_parts(x_TS, hidden_TP, padded: int) -> torch.Tensor:
    filled = torch.nn.functional.pad(hidden_TP, (0, padded - hidden_TP.shape[1]))
    return torch.cat((x_TS, filled, filled), 1)


@join_input.register_kernel("cpu")
def _(x_TS, down_PS, padded, scale):
    hidden_TP = x_TS @ down_PS.t() * scale
    return hidden_TP, _joined_parts(x_TS, hidden_TP, padded)


@join_input.register_fake
def _(x_TS, down_PS, padded, scale):
    tokens, columns = x_TS.shape
    return x_TS.new_empty((tokens, down_PS.shape[0])), x_TS.new_empty((tokens, columns + 2 * padded))
