"""cuSPARSELt through ctypes, with plans kept: setting one up costs more than most products.

Two products, all 16-bit with fp32 sums. The library wants the sparse matrix on the left and adds beta C, C being D; its
row-major or column-major dense matrices say which of the two it is:
    Y [T, N] = X [T, K] W^T (+ bias) (+ Y)   W 2:4 along K; D = W X^T; D, X^T column-major: memory holds Y, X row-major
    D [N, K] = S [N, T] X [T, K]             S 2:4 along T; D and X row-major
The first also with W and X in e4m3, times a factor from the host: for these the library takes no scale from device
memory (a vector of factors is refused, pointers to scales are taken and ignored).

    operand   uint8 [9/8 N K], in e4m3 [5/8 N K]: the packed values [N, K/2] row-major, then the metadata [N K / 8].
              Both facts are the library's own affair; `ops.custom_ops.layout` verifies them before relying on them.
    plan      one for each (N, K, T, dtype, epilogue, algorithm, device), kept for the life of the process
    handle    one for each (process, device)

Header: cusparseLt.h 0.8; the calls used here are the same in 0.6 to 0.10. Nothing here synchronizes.
"""

import ctypes
import dataclasses
import functools
from ctypes import byref, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import ClassVar

import torch

from slope_kernels.cusparselt_library import Opaque, call, handle_of, library

# cudaDataType
DTYPES = {torch.float16: 2, torch.bfloat16: 14}
E4M3 = torch.float8_e4m3fn
CODES = {**DTYPES, E4M3: 28}
# cusparseOrder_t, cusparseOperation_t, cusparseComputeType
COLUMN_MAJOR, ROW_MAJOR = 1, 2
NON_TRANSPOSE = 0
COMPUTE_FP32 = 2
# cusparseLtSparsity_t
HALF_IS_ZERO = 0
# cusparseLtMatmulAlgAttribute_t
CONFIG_ID, CONFIG_MAX_ID, SPLIT_K, SPLIT_K_MODE = 0, 1, 3, 4
# cusparseLtMatmulDescAttribute_t
BIAS_POINTER = 8
ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Product:
    """Y [tokens, rows] = X [tokens, columns] W^T, W [rows, columns] sparse; Y's rows are `stride` elements apart.

    `dtype` is that of W and X; Y's is `output` where it differs, as it does for e4m3.
    With `straight` D [rows, tokens] = W X, X [columns, tokens]: `tokens` is then only the dense matrices' width.
    """

    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype
    device: int
    stride: int
    straight: bool = False
    output: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One of the library's algorithms; its numbers mean something for one library version and architecture only."""

    library: ClassVar[str] = "cusparselt"
    config: int
    split_k: int = 1
    split_k_mode: int = 0

    def __str__(self) -> str:
        return f"algorithm {self.config}"


def padded_tokens(tokens: int) -> int:
    """The library wants whole lines of 16 bytes of every matrix; 16 tokens also cover its transposed kernels."""
    return tokens + -tokens % 16


def operand_bytes(rows: int, columns: int, itemsize: int = 2) -> int:
    """Size of an operand: half the values, and a nibble for every four weights."""
    return rows * columns * itemsize // 2 + rows * columns // 8


def padded_columns(columns: int) -> int:
    """An operand's columns are a multiple of 64; tokens are padded with zeros where they become columns."""
    return columns + -columns % 64


def unsupported_shape(rows: int, columns: int, dtype: torch.dtype) -> str | None:
    """Why this weight cannot be an operand here; None: it can."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} (bf16 and fp16 are)"
    if rows % 64 or columns % 64:
        return f"{rows} x {columns} (both must be multiples of 64)"
    return None


class Plan:
    """Descriptors, algorithm and plan of one product on one device."""

    def __init__(self, product: Product, algorithm: Algorithm | None = None, bias: int = 0):
        """
        Args:
            algorithm: None: the library's default.
            bias: address of a bias `[rows]` of Y's dtype; 0: none.
        """
        self.product = product
        self.handle = handle_of(product.device)
        self.weight, self.x, self.y = Opaque(), Opaque(), Opaque()
        self.matmul, self.selection, self.plan = Opaque(), Opaque(), Opaque()
        with torch.cuda.device(product.device):
            self._describe_matrices()
            self._describe_product(bias)
            self._select(algorithm)
            call("MatmulPlanInit", self.handle, self.plan.pointer, self.matmul.pointer, self.selection.pointer)
        size = c_size_t()
        call("MatmulGetWorkspace", self.handle, self.plan.pointer, byref(size))
        self.workspace_bytes = size.value

    def _describe_matrices(self) -> None:
        """W row-major; X^T and D column-major, so that X and Y are row-major, or row-major themselves."""
        product = self.product
        rows, columns, tokens = c_int64(product.rows), c_int64(product.columns), c_int64(product.tokens)
        layout = (c_uint32(ALIGNMENT), c_int32(CODES[product.dtype]))
        sparse = (*layout, c_int32(ROW_MAJOR), c_int32(HALF_IS_ZERO))
        order = c_int32(ROW_MAJOR if product.straight else COLUMN_MAJOR)
        dense = (*layout, order)
        output = (c_uint32(ALIGNMENT), c_int32(CODES[product.output or product.dtype]), order)
        x_stride = tokens if product.straight else columns
        call("StructuredDescriptorInit", self.handle, self.weight.pointer, rows, columns, columns, *sparse)
        call("DenseDescriptorInit", self.handle, self.x.pointer, columns, tokens, x_stride, *dense)
        call("DenseDescriptorInit", self.handle, self.y.pointer, rows, tokens, c_int64(product.stride), *output)

    def _describe_product(self, bias: int) -> None:
        matrices = (self.weight.pointer, self.x.pointer, self.y.pointer, self.y.pointer)
        operations = (c_int32(NON_TRANSPOSE), c_int32(NON_TRANSPOSE))
        call("MatmulDescriptorInit", self.handle, self.matmul.pointer, *operations, *matrices, c_int32(COMPUTE_FP32))
        if bias:
            size = c_size_t(ctypes.sizeof(c_void_p))
            attribute = (c_int32(BIAS_POINTER), byref(c_void_p(bias)), size)
            call("MatmulDescSetAttribute", self.handle, self.matmul.pointer, *attribute)

    def _select(self, algorithm: Algorithm | None) -> None:
        call("MatmulAlgSelectionInit", self.handle, self.selection.pointer, self.matmul.pointer, c_int32(0))
        if algorithm is None:
            return
        self._set_algorithm(CONFIG_ID, algorithm.config)
        if algorithm.split_k_mode:
            self._set_algorithm(SPLIT_K, algorithm.split_k)
            self._set_algorithm(SPLIT_K_MODE, algorithm.split_k_mode)

    def _set_algorithm(self, attribute: int, value: int) -> None:
        number = c_int32(value)
        selection = self.selection.pointer
        call("MatmulAlgSetAttribute", self.handle, selection, c_int32(attribute), byref(number), c_size_t(4))

    def _get_algorithm(self, attribute: int) -> int:
        number = c_int32()
        selection = self.selection.pointer
        call("MatmulAlgGetAttribute", self.handle, selection, c_int32(attribute), byref(number), c_size_t(4))
        return number.value

    def algorithm(self) -> Algorithm:
        """What this plan runs."""
        return Algorithm(*(self._get_algorithm(attribute) for attribute in (CONFIG_ID, SPLIT_K, SPLIT_K_MODE)))

    def algorithm_count(self) -> int:
        return self._get_algorithm(CONFIG_MAX_ID)

    def close(self) -> None:
        """Give the library's memory back; for plans that are tried and not kept."""
        call("MatmulPlanDestroy", self.plan.pointer)
        if hasattr(library(), "cusparseLtMatmulAlgSelectionDestroy"):
            call("MatmulAlgSelectionDestroy", self.selection.pointer)

    def run(self, operand: int, x: int, y: int, stream: int, *, accumulate: bool = False, factor: float = 1.0) -> None:
        """Enqueue the product, times `factor`; the others are device addresses and a stream.

        Args:
            accumulate: add to what Y holds: read by the epilogue, summed in fp32 and rounded once.
        """
        scratch = _workspace(self.workspace_bytes, self.product.device, stream)
        beta = c_float(float(accumulate))
        inputs = (byref(c_float(factor)), c_void_p(operand), c_void_p(x), byref(beta))
        workspace = c_void_p(scratch.data_ptr() if scratch is not None else None)
        streams = c_void_p(stream)
        output = (c_void_p(y), c_void_p(y))
        call("Matmul", self.handle, self.plan.pointer, *inputs, *output, workspace, byref(streams), c_int32(1))


_workspaces: dict[tuple[int, int], torch.Tensor] = {}


def _workspace(size: int, device: int, stream: int) -> torch.Tensor | None:
    """Scratch memory of one stream, shared by all its products, which run one after the other.

    During a graph capture memory belongs to the graph's own pool, so it is taken anew and not kept.
    """
    if not size:
        return None
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.uint8, device=device)
    kept = _workspaces.get((device, stream))
    if kept is None or kept.numel() < size:
        kept = _workspaces[(device, stream)] = torch.empty(size, dtype=torch.uint8, device=device)
    return kept


@functools.cache
def plan(product: Product, algorithm: Algorithm | None = None, bias: int = 0) -> Plan:
    """The kept plan."""
    return Plan(product, algorithm, bias)


def compress(rows: int, columns: int, dense: torch.Tensor, operand: torch.Tensor) -> None:
    """The library's own compressor: `dense` [rows, columns], already 2:4, into `operand`. As slow as a product."""
    device = dense.device.index
    output = torch.bfloat16 if dense.dtype == E4M3 else None
    sized = plan(Product(rows, columns, 128, dense.dtype, device, rows, output=output))
    size, scratch = c_size_t(), c_size_t()
    call("SpMMACompressedSize", sized.handle, sized.plan.pointer, byref(size), byref(scratch))
    if size.value != operand.numel():
        raise RuntimeError(f"cuSPARSELt wants {size.value} bytes for {rows} x {columns}, not {operand.numel()}")
    buffer = torch.empty(max(scratch.value, 16), dtype=torch.uint8, device=dense.device)
    stream = c_void_p(torch.cuda.current_stream(dense.device).cuda_stream)
    addresses = [c_void_p(tensor.data_ptr()) for tensor in (dense, operand, buffer)]
    with torch.cuda.device(device):
        call("SpMMACompress", sized.handle, sized.plan.pointer, *addresses, stream)
