"""The loader of our CUDA sources, with a script in nvcc's place: what is built, how often, and what is said if not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slope_kernels import load_cuda
from slope_kernels.load_cuda import Source

# As they search, without what an earlier test has found.
COMPILER, HEADERS = load_cuda.compiler.__wrapped__, load_cuda.headers.__wrapped__
SOURCE = Source("sparse_gemm_sm90.cu", "90a", (("SLOPE_TILE_R", "64"),))
NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "release 13.0"; exit 0; }
echo "$@" >> "$(dirname "$0")/calls"
[ -e "$(dirname "$0")/broken" ] && { echo "error: no such tile"; exit 2; }
sleep 0.3
while [ "$1" != -o ]; do shift; done
echo built > "$2"
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A folder with a compiler that writes down its calls, headers and an empty cache."""
    nvcc = tmp_path / "bin" / "nvcc"
    version = tmp_path / "include" / "cutlass" / "version.h"
    for path in (nvcc, version):
        path.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    version.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1\n")
    monkeypatch.setattr(load_cuda, "compiler", lambda: nvcc)
    monkeypatch.setattr(load_cuda, "headers", lambda: tmp_path / "include")
    monkeypatch.setattr(load_cuda, "CACHE", tmp_path / "cache")
    load_cuda._versions.cache_clear()
    yield tmp_path
    load_cuda._versions.cache_clear()


def calls(toolkit: Path) -> list[str]:
    log = toolkit / "bin" / "calls"
    return log.read_text().splitlines() if log.exists() else []


def test_a_library_is_built_once_and_found_again(toolkit):
    path = load_cuda.build(SOURCE)
    assert path == load_cuda.library_path(SOURCE) == load_cuda.build(SOURCE)
    assert path.read_text() == "built\n"
    (call,) = calls(toolkit)
    assert "-gencode=arch=compute_90a,code=sm_90a" in call
    assert "-DSLOPE_TILE_R=64" in call
    left = sorted(entry.suffix for entry in path.parent.iterdir())
    assert left == [".lock", ".so"], "no half-written file stays"


def test_another_macro_or_compiler_is_another_library(toolkit):
    first = load_cuda.library_path(SOURCE)
    assert load_cuda.library_path(Source(SOURCE.file, "90a", (("SLOPE_TILE_R", "128"),))) != first
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(NVCC.replace("13.0", "13.1"))
    load_cuda._versions.cache_clear()
    assert load_cuda.library_path(SOURCE) != first
    assert load_cuda.version().startswith("4.2.1+")


def test_another_header_of_ours_is_another_library(toolkit, monkeypatch):
    sources = toolkit / "csrc"
    sources.mkdir()
    (sources / SOURCE.file).write_text('#include "ours.h"')
    (sources / "ours.h").write_text("one")
    monkeypatch.setattr(load_cuda, "SOURCES", sources)
    path, version = load_cuda.library_path(SOURCE), load_cuda.version()
    (sources / "ours.h").write_text("another")
    assert load_cuda.library_path(SOURCE) != path and load_cuda.version() != version


def test_processes_that_race_compile_once(toolkit):
    program = (
        "from pathlib import Path; from slope_kernels import load_cuda as l; "
        f"folder = Path({str(toolkit)!r}); l.CACHE = folder / 'cache'; "
        "l.compiler = lambda: folder / 'bin/nvcc'; l.headers = lambda: folder / 'include'; "
        f"print(l.build(l.{SOURCE!r}).read_text())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    racing = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in racing] == ["built"] * 3
    assert len(calls(toolkit)) == 1


def test_a_refusal_of_the_compiler_is_told_and_leaves_nothing(toolkit):
    (toolkit / "bin" / "broken").touch()
    with pytest.raises(RuntimeError, match=r"(?s)could not compile sparse_gemm_sm90.cu.*left with 2:.*no such tile"):
        load_cuda.build(SOURCE)
    assert not load_cuda.library_path(SOURCE).exists()
    assert isinstance(load_cuda.build_all([SOURCE])[SOURCE], RuntimeError)
    (toolkit / "bin" / "broken").unlink()
    assert load_cuda.build_all([SOURCE]) == {SOURCE: load_cuda.library_path(SOURCE)}


def test_what_is_missing_is_a_reason(toolkit, monkeypatch):
    assert load_cuda.unsupported() is None
    monkeypatch.setattr(load_cuda, "_folders", lambda package: [])
    monkeypatch.setattr(load_cuda, "headers", HEADERS)
    assert load_cuda.unsupported() == "CUTLASS's headers were not found; pip install nvidia-cutlass"
    with pytest.raises(RuntimeError, match="cannot be compiled: CUTLASS's headers were not found"):
        load_cuda.build(SOURCE)
    monkeypatch.setattr(load_cuda.shutil, "which", lambda name: None)
    assert load_cuda.unsupported() == "g++, which nvcc needs, was not found on the PATH"
    monkeypatch.setattr(load_cuda, "compiler", COMPILER)
    monkeypatch.setattr(load_cuda.os, "access", lambda *_: False)
    assert load_cuda.unsupported().startswith("nvcc was not found; put CUDA's bin folder on the PATH")


def test_the_sources_go_with_the_package():
    """`setup.cfg` lists what an installed package has beside Python."""
    import configparser

    root = Path(__file__).resolve().parents[2]
    cfg = configparser.ConfigParser()
    cfg.read(root / "setup.cfg")
    patterns = [pattern.strip() for pattern in cfg["options.package_data"]["slope_kernels"].split(",")]
    package = root / "kernels" / "slope_kernels"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    assert shipped == set(load_cuda.SOURCES.iterdir())
