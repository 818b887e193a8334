"""Building and opening our CUDA sources: nvcc on first use, the result kept on disk; never at import.

A library is named by what it depends on: the sources, the macros, the architecture, the compiler's and the headers'
versions. Processes that want the same one race for a file lock: one compiles, the others wait and find it. It appears
under its name by an atomic rename, so a build that died leaves nothing that looks finished.

CUTLASS's headers come from the registry's `nvidia-cutlass` wheel, the compiler from the PATH, from CUDA's usual folder
or from the registry's `nvidia-cuda-nvcc` wheel.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "csrc"
CACHE = Path.home() / ".cache" / "slope-megatron" / "kernels"
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr", "-DNDEBUG")
LAST_LINES = 12


@dataclasses.dataclass(frozen=True)
class Source:
    """One shared library to be.

    Args:
        file: its name in `csrc/`.
        architecture: as nvcc writes it: "90a", "80".
        macros: (name, value) pairs.
    """

    file: str
    architecture: str
    macros: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.file} ({', '.join(f'{name}={value}' for name, value in self.macros)})"


def _folders(package: str) -> list[Path]:
    """Where an installed package lies, found without importing it; none: it is not installed."""
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(package)
        return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    return []


@functools.cache
def compiler() -> Path:
    """nvcc.

    Raises:
        RuntimeError: there is none.
    """
    found = shutil.which("nvcc")
    folders = [Path("/usr/local/cuda/bin")]
    for wheel in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        folders += [folder / "bin" for folder in _folders(wheel)]
    for path in ([Path(found)] if found else []) + [folder / "nvcc" for folder in folders]:
        if os.access(path, os.X_OK):
            return path
    raise RuntimeError("nvcc was not found; put CUDA's bin folder on the PATH, or pip install nvidia-cuda-nvcc")


@functools.cache
def headers() -> Path:
    """CUTLASS's include folder inside the wheel.

    Raises:
        RuntimeError: there is none.
    """
    for folder in _folders("cutlass_library"):
        include = folder / "source" / "include"
        if (include / "cutlass" / "cutlass.h").is_file():
            return include
    raise RuntimeError("CUTLASS's headers were not found; pip install nvidia-cutlass")


def unsupported() -> str | None:
    """Why nothing can be compiled here; None: it can."""
    try:
        compiler()
        if shutil.which("g++") is None:
            return "g++, which nvcc needs, was not found on the PATH"
        headers()
    except RuntimeError as missing:
        return str(missing)
    return None


def _texts(file: str) -> bytes:
    """A source and all our headers: which of them it includes is the compiler's affair."""
    return b"\0".join(path.read_bytes() for path in (SOURCES / file, *sorted(SOURCES.glob("*.h"))))


def version() -> str:
    """CUTLASS's version and a digest of all our sources."""
    text = (headers() / "cutlass" / "version.h").read_text()
    numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) (\d+)", text))
    parts = [numbers[part] for part in ("MAJOR", "MINOR", "PATCH")]
    texts = b"\0".join(_texts(path.name) for path in sorted(SOURCES.glob("*.cu")))
    return f"{'.'.join(parts)}+{hashlib.sha256(texts).hexdigest()[:8]}"


@functools.cache
def _versions() -> str:
    """What a build depends on besides our own sources."""
    said = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return said + (headers() / "cutlass" / "version.h").read_text()


def library_path(source: Source) -> Path:
    """Where the library of a source is, or will be."""
    parts = [_texts(source.file), repr(source).encode(), repr(FLAGS).encode(), _versions().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    return CACHE / f"{Path(source.file).stem}-{digest}.so"


def _command(source: Source, target: Path) -> list[str]:
    toolkit = compiler().resolve().parent.parent
    target_code = f"-gencode=arch=compute_{source.architecture},code=sm_{source.architecture}"
    macros = [f"-D{name}={value}" for name, value in source.macros]
    # A wheel keeps its libraries in lib, where its nvcc does not look.
    return [
        *(str(compiler()), *FLAGS, target_code, *macros, f"-I{headers()}", f"-L{toolkit / 'lib'}"),
        *("-o", str(target), str(SOURCES / source.file)),
    ]


@contextlib.contextmanager
def _lock(path: Path):
    """Held by one process at a time; where the file system has no locks, by nobody: a rename is atomic anyway."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("%s: no lock (%s): processes that start together may each compile", path, error.strerror)
        yield


def build(source: Source) -> Path:
    """The library of a source, compiled now if need be.

    Raises:
        RuntimeError: nothing can be compiled here, with the reason; the compiler refused, with its last lines.
    """
    reason = unsupported()
    if reason:
        raise RuntimeError(f"{source} cannot be compiled: {reason}")
    path = library_path(source)
    if path.is_file():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_suffix(".lock")):
        if path.is_file():
            return path
        logger.info("compiling %s with %s: about a minute, once; kept in %s", source, compiler(), CACHE)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / path.name
            run = subprocess.run(_command(source, made), capture_output=True, text=True, cwd=folder)
            if run.returncode:
                said = "\n".join((run.stdout + run.stderr).strip().splitlines()[-LAST_LINES:])
                raise RuntimeError(f"nvcc could not compile {source} and left with {run.returncode}:\n{said}")
            os.replace(made, path)
    return path


def build_all(sources: list[Source]) -> dict[Source, Path | RuntimeError]:
    """Several at a time, as many as there are processors; each source's library, or why it has none."""

    def attempt(source: Source) -> Path | RuntimeError:
        try:
            return build(source)
        except RuntimeError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(sources, pool.map(attempt, sources), strict=True))


@functools.cache
def library(source: Source) -> ctypes.CDLL:
    """The opened library of a source."""
    return ctypes.CDLL(str(build(source)))
