"""The two products of low-rank adapters, each beside what has to move anyway.

T tokens, S in, R out, P rank; 16-bit values, fp32 sums. Q: the rank filled up with zeros to what an operand wants.
    down    H [T, P] = scale X D^T, D [P, S]; on the way, where asked for, X' [T, S + 2 Q] = [X | H 0 | H 0]
            reads X once (and writes it once), D from the cache
    up      Y [T, R] = Y' + H U^T, U [R, P]; Y' may have rows that are further apart
            reads Y' once and writes Y once, H and U from the cache
Oracle: `slope_megatron.sparsity.reference`.
"""

import torch
import triton
import triton.language as tl

# A program of `down` holds the whole rank in registers.
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
    JOIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """BLOCK_T tokens of H, all of the rank; walks along S. `again` is `x`.

    The copy has a load of its own, from the cache. Triton 3.6 keeps a buffer too few for one that both a product and a
    store read: the next tile's copy overwrites what other warps still multiply.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.arange(0, BLOCK_P)
    here = (token < tokens)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        inside = (column < COLUMNS)[None, :] & here
        part = tl.load(x + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        below = (column < COLUMNS)[:, None] & (place < RANK)[None, :]
        weight = tl.load(factor + place[None, :] * factor_row + column[:, None] * factor_column, mask=below, other=0.0)
        total += tl.dot(part, weight)
        if JOIN:
            copied = tl.load(again + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
            tl.store(joined + token[:, None] * joined_stride + column[None, :], copied, mask=inside)
    found = (total * scale).to(hidden.dtype.element_ty)
    tl.store(hidden + token[:, None] * RANK + place[None, :], found, mask=here & (place < RANK)[None, :])
    if JOIN:
        # Beyond the rank the factor was zero, and so is what fills up.
        copy = joined + token[:, None] * joined_stride + COLUMNS + place[None, :]
        tl.store(copy, found, mask=here & (place < PADDED)[None, :])
        tl.store(copy + PADDED, found, mask=here & (place < PADDED)[None, :])


@triton.jit
def _up_kernel(
    y,
    hidden,
    factor,
    out,
    tokens,
    rows,
    y_stride,
    factor_row,
    factor_column,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A tile of Y."""
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    before = tl.load(y + token[:, None] * y_stride + row[None, :], mask=inside, other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, RANK, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        left_mask = (token < tokens)[:, None] & (place < RANK)[None, :]
        left = tl.load(hidden + token[:, None] * RANK + place[None, :], mask=left_mask, other=0.0)
        right_mask = (place < RANK)[:, None] & (row < rows)[None, :]
        right = tl.load(factor + row[None, :] * factor_row + place[:, None] * factor_column, mask=right_mask, other=0.0)
        total += tl.dot(left, right)
    total += before.to(tl.float32)
    tl.store(out + token[:, None] * rows + row[None, :], total.to(out.dtype.element_ty), mask=inside)


def down_blocks(block_p: int, joined: bool) -> tuple[int, int, int, int]:
    """Tokens and columns a step of `down`, stages and warps: the fastest of twelve on an H200.

    Args:
        block_p: the rank that a program holds.
        joined: whether it writes X' too.
    """
    if not joined:
        return 64, 64, 4, 4
    # 128 columns of a higher rank overflow shared memory.
    return (64, 128, 3, 8) if block_p <= 128 else (64, 64, 4, 8)


def down(
    x_TS: torch.Tensor,
    factor_PS: torch.Tensor,
    hidden_TP: torch.Tensor,
    joined: torch.Tensor | None = None,
    *,
    padded: int = 0,
    scale: float = 1.0,
    blocks: tuple[int, int, int, int] | None = None,
) -> None:
    """Write H, and X' where `joined` `[T, S + 2 padded]` is given.

    Args:
        x_TS: rows contiguous; `factor_PS` in any order; P at most MOST_RANK.
        blocks: tokens and columns a step, stages and warps; None: `down_blocks`.
    """
    tokens, columns = x_TS.shape
    rank = factor_PS.shape[0]
    block_p = max(16, triton.next_power_of_2(max(rank, padded)))
    block_t, block_s, stages, warps = blocks or down_blocks(block_p, joined is not None)
    _down_kernel[(triton.cdiv(tokens, block_t),)](
        x_TS,
        x_TS,
        factor_PS,
        hidden_TP,
        joined if joined is not None else hidden_TP,
        tokens,
        x_TS.stride(0),
        factor_PS.stride(0),
        factor_PS.stride(1),
        joined.stride(0) if joined is not None else 0,
        scale,
        COLUMNS=columns,
        RANK=rank,
        PADDED=padded,
        JOIN=joined is not None,
        BLOCK_T=block_t,
        BLOCK_S=block_s,
        BLOCK_P=block_p,
        num_stages=stages,
        num_warps=warps,
    )


def up(
    y_TR: torch.Tensor,
    hidden_TP: torch.Tensor,
    factor_RP: torch.Tensor,
    out_TR: torch.Tensor,
    *,
    blocks: tuple[int, int, int] = (128, 128, 8),
) -> None:
    """Write Y = Y' + H U^T, contiguous; Y' with contiguous rows.

    Args:
        blocks: tokens and rows a program, and its warps.
    """
    tokens, rows = out_TR.shape
    block_t, block_r, warps = blocks
    _up_kernel[(triton.cdiv(rows, block_r), triton.cdiv(tokens, block_t))](
        y_TR,
        hidden_TP,
        factor_RP,
        out_TR,
        tokens,
        rows,
        y_TR.stride(0),
        factor_RP.stride(0),
        factor_RP.stride(1),
        RANK=hidden_TP.shape[1],
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        BLOCK_P=min(64, max(16, triton.next_power_of_2(hidden_TP.shape[1]))),
        num_warps=warps,
    )
