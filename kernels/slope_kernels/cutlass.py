"""The 2:4 product by CUTLASS's collectives, compiled here and called through ctypes.

    Y [T, R] = X [T, S] W^T (+ C) (+ b); W [R, S] 2:4 along S, 16-bit values, fp32 sums

Values and metadata are separate operands: the values are a packed parameter's own memory, `[R, S/2]` row-major, read
when the product runs; the metadata depends on the indices alone (`slope_megatron.sparsity.operand`). A kernel is one
tile and one shared library; how its tiles are scheduled is an argument. Nothing here synchronizes or allocates.
"""

import ctypes
import dataclasses
import functools
from typing import ClassVar

import torch

from slope_kernels import load_cuda

ELEMENTS = {torch.bfloat16: "cutlass::bfloat16_t", torch.float16: "cutlass::half_t"}
# TMA moves lines of 16 bytes: every matrix starts on one.
ALIGNMENT = 16
# Of every tile: the order of the metadata depends on it.
TILE_COLUMNS = 64


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A tile of `rows` x `columns` of the output, TILE_COLUMNS of the sums at a time, in clusters of blocks.

    Two warpgroups share a tile. Of W's products the output's columns are tokens.
    """

    rows: int
    columns: int
    cluster: tuple[int, int]
    what: str = "cooperative"

    @property
    def name(self) -> str:
        clusters = "x".join(map(str, self.cluster))
        return f"{self.rows}x{self.columns}x{TILE_COLUMNS} {clusters} {self.what}"


KERNELS = {
    kernel.name: kernel
    for kernel in (
        # The fastest tried on an H200: on most shapes, on the largest, and where the others leave processors idle.
        Kernel(128, 256, (2, 1)),
        Kernel(256, 192, (2, 1)),
        Kernel(256, 128, (2, 1)),
    )
}


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A kernel by name and how its tile scheduler goes: groups `swizzle` tiles wide, raster 0 CUTLASS's own, 1 rows
    first, 2 tokens first."""

    library: ClassVar[str] = "cutlass"
    kernel: str
    swizzle: int = 1
    raster: int = 0

    def __str__(self) -> str:
        return f"CUTLASS {self.kernel}, tile scheduler {self.swizzle}/{self.raster}"


DEFAULT = Algorithm(next(iter(KERNELS)))


class Arguments(ctypes.Structure):
    """`Product` of the source, field for field."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("beta", ctypes.c_float),
        ("relu", ctypes.c_int32),
        ("swizzle", ctypes.c_int32),
        ("raster", ctypes.c_int32),
    ]


@functools.cache
def unsupported() -> str | None:
    """Why this machine cannot run these products; None: it can. Nothing is compiled to find out."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"its kernels are for sm_90 (H100, H200), this is sm_{major}{minor}"
    return load_cuda.unsupported()


@functools.cache
def version() -> str:
    """Of the headers and of our sources: what an algorithm's name depends on; "none" where nothing can be compiled."""
    return "none" if unsupported() else load_cuda.version()


def unsupported_shape(rows: int, columns: int, dtype: torch.dtype) -> str | None:
    """Why this weight cannot be an operand here; None: it can."""
    if dtype not in ELEMENTS:
        return f"{str(dtype).removeprefix('torch.')} (bf16 and fp16 are)"
    if rows % 64 or columns % 64:
        return f"{rows} x {columns} (both must be multiples of 64)"
    return None


def hopper_source(file: str, **macros) -> load_cuda.Source:
    """One of our sources, for sm_90."""
    return load_cuda.Source(file, "90a", tuple((name, str(value)) for name, value in macros.items()))


def enqueue(function, arguments: ctypes.Structure, device: int, error_text, what: str) -> None:
    """Call a library's function on the current stream.

    Args:
        error_text: the library's own, from its error codes.
        what: the product, for the message.
    Raises:
        RuntimeError: CUTLASS refused, with its reason.
    """
    error = function(ctypes.byref(arguments), torch.cuda.current_stream(device).cuda_stream)
    if error:
        raise RuntimeError(f"CUTLASS refused {what}: {error_text(error).decode()}")


def source(kernel: Kernel, dtype: torch.dtype, with_source: bool = False) -> load_cuda.Source:
    """What to compile for a kernel; `with_source`: with the epilogue that adds C."""
    macros = {
        "SLOPE_ELEMENT": ELEMENTS[dtype],
        "SLOPE_TILE_R": kernel.rows,
        "SLOPE_TILE_T": kernel.columns,
        "SLOPE_TILE_S": TILE_COLUMNS,
        "SLOPE_CLUSTER_R": kernel.cluster[0],
        "SLOPE_CLUSTER_T": kernel.cluster[1],
        "SLOPE_SCHEDULE": "Cooperative",
        "SLOPE_SOURCE": int(with_source),
    }
    return hopper_source("sparse_gemm_sm90.cu", **macros)


@functools.cache
def library(name: str, dtype: torch.dtype, with_source: bool = False) -> ctypes.CDLL:
    """The library of a kernel of `KERNELS`, compiled on first use.

    Raises:
        RuntimeError: it cannot be compiled.
    """
    opened = load_cuda.library(source(KERNELS[name], dtype, with_source))
    opened.slope_sparse_gemm.argtypes = (ctypes.POINTER(Arguments), ctypes.c_void_p)
    opened.slope_metadata_bytes.restype = ctypes.c_int64
    opened.slope_error.restype = ctypes.c_char_p
    return opened


def run(
    algorithm: Algorithm,
    values_RC: torch.Tensor,
    metadata: torch.Tensor,
    x_TS: torch.Tensor,
    y_TR: torch.Tensor,
    *,
    bias_R: torch.Tensor | None = None,
    source_TR: torch.Tensor | None = None,
) -> None:
    """Enqueue Y = X W^T (+ C) (+ b) on the current stream; C is `source_TR`.

    Args:
        values_RC, x_TS, source_TR, y_TR: row-major on 16-byte boundaries; `y_TR` may be `source_TR`.
    Raises:
        RuntimeError: CUTLASS refused, with its reason.
    """
    tokens, columns = x_TS.shape
    rows, device = values_RC.shape[0], x_TS.device.index
    opened = library(algorithm.kernel, x_TS.dtype, source_TR is not None)
    arguments = Arguments(
        values_RC.data_ptr(),
        metadata.data_ptr(),
        x_TS.data_ptr(),
        None if bias_R is None else bias_R.data_ptr(),
        None if source_TR is None else source_TR.data_ptr(),
        y_TR.data_ptr(),
        rows,
        rows,
        columns,
        tokens,
        device,
        0.0 if source_TR is None else 1.0,
        False,
        algorithm.swizzle,
        algorithm.raster,
    )
    what = f"the product {rows} x {columns}, {tokens} tokens, with {algorithm.kernel}"
    enqueue(opened.slope_sparse_gemm, arguments, device, opened.slope_error, what)


def metadata_positions(name: str, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """CUTLASS's own word on the metadata's order: for each group int64 `[rows, columns/4]` the number of its nibble."""
    positions = torch.empty(rows, columns // 4, dtype=torch.int64)
    library(name, dtype).slope_metadata_places(rows, columns, ctypes.c_void_p(positions.data_ptr()))
    return positions
