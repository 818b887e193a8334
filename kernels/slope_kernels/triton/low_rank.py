"""H = scale X D^T beside a copy of X: what a product of an operand with adapters in it reads.

T tokens, S in, P rank; 16-bit values, fp32 sums. Q: the rank padded with zeros to what an operand wants.
    H [T, P] = scale X D^T, D [P, S], and X' [T, S + 2 Q] = [X | H 0 | H 0]
X is read once and written once, D comes from the cache. Oracle: plain torch, as `slope::join_input` has it on a CPU.
"""

import torch
import triton
import triton.language as tl

# A program holds the whole rank in registers.
MOST_RANK = 256


@triton.jit
def _down_kernel(
    x,
    again,
    factor,
    hidden,
    joined,
    tokens,
    x_stride,
    factor_row,
    factor_column,
    joined_stride,
    scale,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """BLOCK_T tokens of H, all of the rank; goes along S. `again` is `x`.

    The copy has a load of its own, from the cache. Triton 3.6 keeps a buffer too few for one that both a product and a
    store read: the next tile's copy overwrites what other warps still multiply.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    index = tl.arange(0, BLOCK_P)
    here = (token < tokens)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        inside = (column < COLUMNS)[None, :] & here
        part = tl.load(x + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        below = (column < COLUMNS)[:, None] & (index < RANK)[None, :]
        weight = tl.load(factor + index[None, :] * factor_row + column[:, None] * factor_column, mask=below, other=0.0)
        total += tl.dot(part, weight)
        copied = tl.load(again + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        tl.store(joined + token[:, None] * joined_stride + column[None, :], copied, mask=inside)
    found = (total * scale).to(hidden.dtype.element_ty)
    tl.store(hidden + token[:, None] * RANK + index[None, :], found, mask=here & (index < RANK)[None, :])
    # Beyond the rank the factor was zero, and so is the padding.
    copy = joined + token[:, None] * joined_stride + COLUMNS + index[None, :]
    tl.store(copy, found, mask=here & (index < PADDED)[None, :])
    tl.store(copy + PADDED, found, mask=here & (index < PADDED)[None, :])


def down_blocks(block_p: int) -> tuple[int, int, int, int]:
    """Tokens and columns a step, stages and warps for a rank that fills `block_p`: the fastest of twelve on an H200."""
    # 128 columns of a higher rank overflow shared memory.
    return (64, 128, 3, 8) if block_p <= 128 else (64, 64, 4, 8)


def down(
    x_TS: torch.Tensor,
    factor_PS: torch.Tensor,
    hidden_TP: torch.Tensor,
    joined: torch.Tensor,
    *,
    padded: int,
    scale: float,
) -> None:
    """Write H, and X' into `joined` `[T, S + 2 padded]`.

    Args:
        x_TS: rows contiguous; `factor_PS` in any order; P at most MOST_RANK.
    """
    tokens, columns = x_TS.shape
    rank = factor_PS.shape[0]
    block_p = max(16, triton.next_power_of_2(max(rank, padded)))
    block_t, block_s, stages, warps = down_blocks(block_p)
    _down_kernel[(triton.cdiv(tokens, block_t),)](
        x_TS,
        x_TS,
        factor_PS,
        hidden_TP,
        joined,
        tokens,
        x_TS.stride(0),
        factor_PS.stride(0),
        factor_PS.stride(1),
        joined.stride(0),
        scale,
        COLUMNS=columns,
        RANK=rank,
        PADDED=padded,
        BLOCK_T=block_t,
        BLOCK_S=block_s,
        BLOCK_P=block_p,
        num_stages=stages,
        num_warps=warps,
    )
