"""wgrad without a dense gradient: our own kernels whose epilogue keeps the kept half, called through ctypes.

    packed [N, C] = kept(S X)     S = P(dY)^T [N, T], 2:4 along the tokens; X [T, K]

T tokens, N out, K in, C = K/2 kept per row; 16-bit values, fp32 sums, rounded once. A kernel is one tile and one shared
library; how its tiles are scheduled is an argument. Nothing here synchronizes or allocates.
Oracle: `slope_megatron.sparsity.packing.pack` of the dense product.
"""

import ctypes
import functools

import torch

from slope_kernels import load_cuda
from slope_kernels.cutlass import ELEMENTS, TILE_COLUMNS, Algorithm, Kernel, enqueue, hopper_source

KERNELS = {kernel.name: kernel for kernel in (Kernel(128, 256, (2, 1), "packing"), Kernel(256, 128, (2, 1), "packing"))}
DEFAULT = Algorithm(next(iter(KERNELS)))


class Arguments(ctypes.Structure):
    """`Product` of the source, field for field."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("row_bits", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("swizzle", ctypes.c_int32),
        ("raster", ctypes.c_int32),
    ]


def source(kernel: Kernel, dtype: torch.dtype) -> load_cuda.Source:
    """What to compile for a kernel."""
    macros = {
        "SLOPE_ELEMENT": ELEMENTS[dtype],
        "SLOPE_TILE_R": kernel.rows,
        "SLOPE_TILE_C": kernel.columns,
        "SLOPE_TILE_T": TILE_COLUMNS,
        "SLOPE_CLUSTER_R": kernel.cluster[0],
        "SLOPE_CLUSTER_C": kernel.cluster[1],
    }
    return hopper_source("packed_wgrad_sm90.cu", **macros)


@functools.cache
def library(name: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The library of a kernel of `KERNELS`, compiled on first use.

    Raises:
        RuntimeError: it cannot be compiled.
    """
    opened = load_cuda.library(source(KERNELS[name], dtype))
    opened.slope_packed_wgrad.argtypes = (ctypes.POINTER(Arguments), ctypes.c_void_p)
    opened.slope_error.restype = ctypes.c_char_p
    return opened


def run(
    algorithm: Algorithm, operand: torch.Tensor, x_TK: torch.Tensor, row_bits: torch.Tensor, packed_NC: torch.Tensor
) -> None:
    """Enqueue packed = kept(S X) on the current stream; N and K are multiples of 64.

    Args:
        algorithm: its kernel one of `KERNELS`, its tile scheduler over rows and columns.
        operand: of P(dY)^T, uint8 `[9/8 N S]`, values, then metadata in CUTLASS's order; S is T padded to a
            multiple of 64.
        row_bits: uint8 `[N, K/8]`; like all others contiguous, on a 16-byte boundary.
    Raises:
        RuntimeError: CUTLASS refused, with its reason.
    """
    tokens, columns = x_TK.shape
    rows, device = packed_NC.shape[0], x_TK.device.index
    arguments = Arguments(
        operand.data_ptr(),
        operand.data_ptr() + operand.numel() // 9 * 8,
        x_TK.data_ptr(),
        row_bits.data_ptr(),
        packed_NC.data_ptr(),
        rows,
        columns,
        tokens,
        device,
        algorithm.swizzle,
        algorithm.raster,
    )
    opened = library(algorithm.kernel, x_TK.dtype)
    what = f"the wgrad {rows} x {columns}, {tokens} tokens, with {algorithm.kernel}"
    enqueue(opened.slope_packed_wgrad, arguments, device, opened.slope_error, what)
