"""Operand buffers, and what the library's layout turned out to be on this device.

An operand of R rows and S columns is uint8 `[9/8 R S]`, or `[5/8 R S]` in e4m3: values, then metadata. cuSPARSELt does
not document either, so both are read off its own compressor once for each (device, dtype):

    values first, row-major   required; otherwise the backend is refused here
    metadata as on sm_90      then our kernels write it; otherwise the library's compressor does, from a matrix of ones
                              with our indices, since metadata depends on them alone
Tiles cut an operand's rows: each tile is an operand of its own, one after the other in the buffer.
"""

import dataclasses
import functools
import logging

import torch

from slope_kernels import cusparselt
from slope_megatron.sparsity.float8 import E4M3
from slope_megatron.sparsity.operand import metadata_e4m3, metadata_sm90, scatter_slots, slot_indices
from slope_megatron.sparsity.pattern import random_pattern

logger = logging.getLogger(__name__)
PROBE_ROWS, PROBE_COLUMNS = 192, 320


@dataclasses.dataclass(frozen=True)
class Layout:
    """How operands look on one device."""

    known_metadata: bool
    refused: str | None = None


@functools.cache
def probe(device: torch.device, dtype: torch.dtype) -> Layout:
    """Compress a random 2:4 matrix with the library and look."""
    if device.type == "cpu":
        # The plain-torch products read what our kernels write.
        return Layout(known_metadata=True)
    generator = torch.Generator(device).manual_seed(0)
    words = torch.randint(0, 1 << 32, (PROBE_ROWS, PROBE_COLUMNS), device=device, generator=generator)
    row = random_pattern(words, 2, 4)
    # None is zero: the compressor keeps what is not.
    values = torch.randint(1, 16, (PROBE_ROWS, PROBE_COLUMNS // 2), device=device, generator=generator)
    values = torch.where(words[:, ::2] > 1 << 31, values, -values).to(dtype)
    indices = slot_indices(row)
    operand = torch.zeros(operand_bytes(PROBE_ROWS, PROBE_COLUMNS, dtype), dtype=torch.uint8, device=device)
    try:
        cusparselt.compress(PROBE_ROWS, PROBE_COLUMNS, scatter_slots(values, indices), operand)
    except RuntimeError as error:
        return Layout(False, f"its compressor failed the probe: {error}")
    size = values.numel() * dtype.itemsize
    if not torch.equal(operand[:size], values.view(torch.uint8).flatten()):
        return Layout(False, "its compressed values are not the packed values in row order")
    expected = metadata_sm90(indices)
    if dtype == E4M3:
        expected = metadata_e4m3(expected, PROBE_ROWS, PROBE_COLUMNS // 4)
    known = torch.equal(operand[size:], expected)
    if not known:
        logger.info("2:4 metadata of %s on %s differs from sm_90's: the library's compressor writes it", dtype, device)
    return Layout(known)


def operand_bytes(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> int:
    return cusparselt.operand_bytes(rows, columns, dtype.itemsize)


def values_of(operand: torch.Tensor, rows: int, columns: int, tiles: int, dtype: torch.dtype) -> torch.Tensor:
    """View of the values, `[tiles, rows/tiles, columns/2]`."""
    size = rows * columns // tiles * dtype.itemsize // 2
    return operand.view(tiles, -1)[:, :size].view(dtype).unflatten(1, (rows // tiles, columns // 2))


def metadata_of(operand: torch.Tensor, rows: int, columns: int, tiles: int) -> torch.Tensor:
    """View of the metadata, uint8 `[tiles, rows columns / (8 tiles)]`."""
    return operand.view(tiles, -1)[:, -(rows * columns // (8 * tiles)) :]


def retile(operand: torch.Tensor, rows: int, columns: int, tiles: int, new_tiles: int) -> torch.Tensor:
    """The same operand cut anew. A tile's rows must be a multiple of 64: then its metadata is a slice of the whole."""
    size = rows * columns
    whole = operand.view(tiles, -1)
    values = whole[:, : size // tiles].reshape(new_tiles, -1)
    metadata = whole[:, size // tiles :].reshape(new_tiles, -1)
    return torch.cat((values, metadata), 1).flatten()


def library_metadata(indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Metadata from the library's compressor, for layouts that our kernels do not write. Places `[R, G, 2]`."""
    rows, groups, _ = indices.shape
    ones = scatter_slots(torch.ones(rows, groups * 2, dtype=dtype, device=indices.device), indices)
    operand = torch.empty(operand_bytes(rows, groups * 4, dtype), dtype=torch.uint8, device=indices.device)
    cusparselt.compress(rows, groups * 4, ones, operand)
    return operand[-rows * groups // 2 :]
