"""What `pip install .` puts on a machine: every package, every shipped file once, and commands that work there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {
    "slope_megatron/shipped/clusters": "launch/clusters/*.env",
    "slope_megatron/shipped/models": "launch/models/*.yaml",
    "slope_megatron/shipped/recipes": "launch/recipes/*.yaml",
    "slope_megatron/shipped/study": "launch/study/*.yaml",
    "slope_megatron/shipped/results": "kernels/results/gemm.csv",
    "slope_kernels/csrc": "kernels/slope_kernels/csrc/*.[ch]*",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    files = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    ).split()
    for name in files:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(copy),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
    ]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_it_holds_every_module_and_every_shipped_file(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "slope_megatron").rglob("*.py")}
    modules |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels/slope_kernels").rglob("*.py")}
    shipped = {f"{folder}/{path.name}" for folder, pattern in SHIPPED.items() for path in ROOT.glob(pattern)}
    assert all(any(name.startswith(folder) for name in shipped) for folder in SHIPPED), "each kind has files"
    assert held == modules | shipped


def test_commands_work_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "100"}

    where = [sys.executable, "-c", "import slope_megatron; print(slope_megatron.__file__)"]
    found = subprocess.check_output(where, cwd=tmp_path, env=environment, text=True)
    assert found.startswith(str(tmp_path / "site")), "the wheel's own, not the checkout's"

    def slope(*arguments):
        command = [sys.executable, "-m", "slope_megatron", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    planned = slope("plan", "--cluster", "narval", "--nodes", "8", "--config", "models/opt-66b")
    assert planned.startswith("narval: 8 nodes x 4 A100") and "TP4 PP8 DP1 ZeRO-1" in planned
    assert "--steps" in slope("quickstart", "--help")
    assert "decode" in slope("bench", "--help") and "--tensor-parallel" in slope("bench", "gemm", "--help")
