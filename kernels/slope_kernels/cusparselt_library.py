"""Finding and opening cuSPARSELt: the wheel's shared library through ctypes, its version, errors and handles."""

import ctypes
import functools
import glob
import os
from ctypes import byref, c_int32, c_void_p

import torch

OLDEST = (0, 6, 0)


@functools.cache
def library_path() -> str | None:
    """The wheel's library (`nvidia-cusparselt-cu*`, which torch's CUDA wheels require), else one beside torch's own."""
    folders = [os.path.join(os.path.dirname(torch.__file__), "lib")]
    try:
        import nvidia.cusparselt

        folders = [os.path.join(folder, "lib") for folder in nvidia.cusparselt.__path__] + folders
    except ImportError:
        pass
    found = [path for folder in folders for path in sorted(glob.glob(os.path.join(folder, "libcusparseLt.so*")))]
    return found[0] if found else None


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(library_path())


@functools.cache
def version() -> tuple[int, int, int]:
    """(major, minor, patch), asked of the library itself; no GPU needed."""
    return _property(0), _property(1), _property(2)


def _property(kind: int) -> int:
    value = c_int32()
    call("GetProperty", c_int32(kind), byref(value))
    return value.value


@functools.cache
def unsupported() -> str | None:
    """Why this machine cannot run these products; None: it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"sm_{capability[0]}{capability[1]} has no 2:4 units; they came with sm_80 (A100)"
    if library_path() is None:
        return "libcusparseLt.so was not found; pip install nvidia-cusparselt-cu12 (or -cu13, as torch's CUDA)"
    try:
        found = version()
    except (OSError, RuntimeError) as error:
        return f"{library_path()} cannot be used: {error}"
    if found < OLDEST:
        return f"cuSPARSELt {'.'.join(map(str, found))} is older than {'.'.join(map(str, OLDEST))}; upgrade the wheel"
    return None


def call(name: str, *arguments) -> None:
    """`cusparseLt<name>(*arguments)`.

    Raises:
        RuntimeError: the library refused, with its reason.
    """
    status = getattr(library(), f"cusparseLt{name}")(*arguments)
    if status:
        reason = library().cusparseLtGetErrorString
        reason.restype = ctypes.c_char_p
        raise RuntimeError(f"cusparseLt{name} failed with status {status} ({reason(c_int32(status)).decode()})")


class Opaque:
    """Storage of one of the library's structs: 1024 bytes at most, aligned to 16."""

    def __init__(self):
        self.bytes = (ctypes.c_uint8 * 1040)()
        self.pointer = c_void_p((ctypes.addressof(self.bytes) + 15) // 16 * 16)


@functools.cache
def _handle(process: int, device: int) -> Opaque:
    handle = Opaque()
    with torch.cuda.device(device):
        call("Init", handle.pointer)
    return handle


def handle_of(device: int) -> c_void_p:
    return _handle(os.getpid(), device).pointer
