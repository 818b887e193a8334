"""Registered ops of low-rank adapters: what runs beside a sparse product (`operands.low_rank`, `operands.augmented`).

T tokens, S in, R out, P rank, D [P, S] and U [R, P] the adapters' factors.
    slope::low_rank_hidden  H [T, P] = scale X D^T
    slope::join_input       the same, and X' = [X | H 0 | H 0]
    slope::add_low_rank     Y [T, R] + H U^T, contiguous
On CUDA they run `slope_kernels`; on a CPU their plain-torch twins.
"""

import torch

# Below these tokens, a kernel whose programs each hold the whole rank of some tokens leaves most of a GPU idle.
FEW_TOKENS = 2048


def suits_kernel(tokens: int, rank: int) -> bool:
    """Whether the kernel that computes H fits: elsewhere torch's product serves better."""
    from slope_kernels.triton import low_rank

    return rank <= low_rank.MOST_RANK and tokens >= FEW_TOKENS


@torch.library.custom_op("slope::low_rank_hidden", mutates_args=(), device_types="cuda")
def low_rank_hidden(x_TS: torch.Tensor, down_PS: torch.Tensor, scale: float) -> torch.Tensor:
    """H `[T, P]` = scale X D^T, the scale applied to the fp32 sums."""
    from slope_kernels.triton import low_rank

    hidden_TP = x_TS.new_empty((x_TS.shape[0], down_PS.shape[0]))
    if not suits_kernel(*hidden_TP.shape):
        # With beta 0 nothing is read of what the new tensor holds.
        return hidden_TP.addmm_(x_TS, down_PS.t(), beta=0, alpha=scale)
    low_rank.down(x_TS if x_TS.stride(1) == 1 else x_TS.contiguous(), down_PS, hidden_TP, scale=scale)
    return hidden_TP


@low_rank_hidden.register_kernel("cpu")
def _(x_TS, down_PS, scale):
    return x_TS @ down_PS.t() * scale


@low_rank_hidden.register_fake
def _(x_TS, down_PS, scale):
    return x_TS.new_empty((x_TS.shape[0], down_PS.shape[0]))


@torch.library.custom_op("slope::join_input", mutates_args=(), device_types="cuda")
def join_input(
    x_TS: torch.Tensor, down_PS: torch.Tensor, padded: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """H `[T, P]` = scale X D^T, and X' `[T, S + 2 padded]` = [X | H 0 | H 0]."""
    from slope_kernels.triton import low_rank

    rank = down_PS.shape[0]
    if not suits_kernel(x_TS.shape[0], rank):
        hidden_TP = low_rank_hidden(x_TS, down_PS, scale)
        return hidden_TP, _joined_parts(x_TS, hidden_TP, padded)
    x_TS = x_TS if x_TS.stride(1) == 1 else x_TS.contiguous()
    hidden_TP = x_TS.new_empty((x_TS.shape[0], rank))
    joined = x_TS.new_empty((x_TS.shape[0], x_TS.shape[1] + 2 * padded))
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


@torch.library.custom_op("slope::add_low_rank", mutates_args=(), device_types="cuda")
def add_low_rank(y_TR: torch.Tensor, hidden_TP: torch.Tensor, up_RP: torch.Tensor) -> torch.Tensor:
    """Y `[T, R]` + H U^T, contiguous whatever Y's strides are."""
    from slope_kernels.triton import low_rank

    y_TR = y_TR if y_TR.stride(1) == 1 else y_TR.contiguous()
    out_TR = y_TR.new_empty(y_TR.shape)
    low_rank.up(y_TR, hidden_TP.contiguous(), up_RP, out_TR)
    return out_TR


@add_low_rank.register_kernel("cpu")
def _(y_TR, hidden_TP, up_RP):
    return (y_TR.float() + hidden_TP.float() @ up_RP.float().t()).to(y_TR.dtype)


@add_low_rank.register_fake
def _(y_TR, hidden_TP, up_RP):
    return y_TR.new_empty(y_TR.shape)
