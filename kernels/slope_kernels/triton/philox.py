"""Philox4x32: the counter generator of `slope_megatron.sparsity.counter`, word for word.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Triton's own `tl.philox` is the same, but
a jitted library function: the interpreter, chosen per kernel, cannot run it.
"""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr):
    """Four words of one counter; all uint32."""
    for _ in tl.static_range(ROUNDS):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3
