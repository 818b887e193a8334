"""No time of day is compared: hosts and file servers differ, and jump. Durations are of the monotonic clock."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "getmtime", "getctime"}
WALL |= {"st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "st_atime", "st_atime_ns"}
# Compared with what the same file had before, or has for another rank, and only whether it is equal.
EQUALITY = {
    ("training/watch/heartbeat.py", "st_mtime_ns"),
    ("training/data_check.py", "st_mtime_ns"),
    ("data/sources.py", "st_mtime_ns"),
}
FILES = [path for part in ("slope_megatron", "kernels") for path in sorted((ROOT / part).rglob("*.py"))]


def wall_clocks(path: Path) -> set[str]:
    """The names of WALL in a file, as attributes or imported."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found |= {node.attr, ast.unparse(node), f"{ast.unparse(node.value).rpartition('.')[2]}.{node.attr}"}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & WALL


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_time_of_day_is_compared(path):
    allowed = {name for file, name in EQUALITY if str(path).endswith(file)}
    assert wall_clocks(path) <= allowed
