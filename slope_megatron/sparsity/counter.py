"""Random numbers that depend on (seed, name, element index) alone: Philox4x32-10 as a function, not a stream.

A tensor cut over any number of ranks is filled with the same numbers, because each element asks for its own by its
index in the whole tensor. Element `i` of a tensor reads word `i % 4` of the Philox block with counter `i // 4`. Of the
counter's four words that takes two; the others, the *stream*, tell apart tensors that share a key.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Triton's `tl.philox` is the same.
There, 7 rounds are the fewest whose words pass every test of TestU01's BigCrush, and 10 the default, with a margin.
"""

import hashlib
import math

import torch

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# 32 bits: a number, or an int64 tensor of one element.
Word = int | torch.Tensor


def key_of(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit key words of one named tensor: a hash, so that names never share a stream by accident."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _multiply_(word: torch.Tensor, factor: int, high: torch.Tensor) -> None:
    """High and low word of a 32 x 32 bit product, the low one into `word`: int64 wraps around, so the low
    64 bits are right."""
    word.mul_(factor)
    torch.bitwise_right_shift(word, 32, out=high).bitwise_and_(MASK32)
    word.bitwise_and_(MASK32)


def philox(key: tuple[Word, Word], block: torch.Tensor, stream=(0, 0), rounds: int = ROUNDS) -> torch.Tensor:
    """Four 32-bit words for each counter.

    Args:
        key: two 32-bit words.
        block: int64 counters >= 0, any shape: the low half of the whole counter.
        stream: two 32-bit words, the high half; numbers, or int64 tensors that broadcast to its shape.
    Returns:
        int64 `[..., 4]`, each in [0, 2^32).
    """
    c0, c1 = block & MASK32, (block >> 32) & MASK32
    c2, c3 = (torch.zeros_like(block) + word for word in stream)
    high0, high1 = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key
    # In place, in six tensors: on a CPU new memory costs more than the arithmetic.
    for _ in range(rounds):
        _multiply_(c0, MULTIPLIERS[0], high0)
        _multiply_(c2, MULTIPLIERS[1], high1)
        high1.bitwise_xor_(c1).bitwise_xor_(k0)
        high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c0, c1, c2, c3, high0, high1 = high1, c2, high0, c0, c1, c3
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _normals(key: tuple[int, int], block: torch.Tensor) -> torch.Tensor:
    """Box-Muller on both pairs of words. In fp64, then rounded: an implementation's last bit does not show in fp32."""
    uniform = (philox(key, block).double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = 2.0 * math.pi * uniform[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-2).float()


def _region(function, key, rows: torch.Tensor, columns: range, row_length: int, **more) -> torch.Tensor:
    """`function`'s values for the elements [rows, columns] of a row-major matrix whose rows are `row_length` long."""
    first = rows[:, None] * row_length
    if row_length % 4 == 0 and columns.start % 4 == 0 and columns.stop % 4 == 0:
        blocks = (first + torch.arange(columns.start, columns.stop, 4, device=rows.device)) // 4
        return function(key, blocks, **more).flatten(-2)
    index = first + torch.arange(columns.start, columns.stop, device=rows.device)
    return function(key, index // 4, **more).gather(-1, (index % 4)[..., None]).squeeze(-1)


def _rows(rows: range, device) -> torch.Tensor:
    return torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64)


def bits(key: tuple[int, int], rows: range, columns: range, row_length: int, device="cpu") -> torch.Tensor:
    """Uniform 32-bit words, int64 `[len(rows), len(columns)]`, of a region of a row-major matrix."""
    return _region(philox, key, _rows(rows, device), columns, row_length)


def bits_of_rows(
    key: tuple[Word, Word], rows: torch.Tensor, row_length: int, stream, rounds: int = ROUNDS
) -> torch.Tensor:
    """Uniform 32-bit words, int64 `[len(rows), row_length]`, of any whole rows, each of its own stream.

    Args:
        key: two words.
        rows: int64.
        stream: two words, int64 `[len(rows), 1]` each.
    """
    return _region(philox, key, rows, range(row_length), row_length, stream=stream, rounds=rounds)


def normal(key: tuple[int, int], rows: range, columns: range, row_length: int, device="cpu") -> torch.Tensor:
    """Standard normal numbers, fp32 `[len(rows), len(columns)]`, of a region of a row-major matrix."""
    return _region(_normals, key, _rows(rows, device), columns, row_length)
