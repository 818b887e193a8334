"""Each part may import only the parts listed for it; the table is the architecture."""

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "slope_kernels": set(),
    "config": set(),
    "storage": set(),
    "versions": set(),
    "sparsity": set(),
    "ops": {"slope_kernels", "sparsity", "config", "storage"},
    "linear": {"ops", "config"},
    "layers": {"linear", "ops", "sparsity", "config"},
    "models": {"layers", "sparsity", "config", "storage", "versions"},
    "inference": {"ops", "sparsity", "config", "storage"},
    "export": {"models", "data", "inference", "sparsity", "config", "storage"},
    "data": {"config", "storage"},
    "evaluation": {"models", "layers", "data", "export", "inference", "config", "storage"},
    "training": {"models", "layers", "ops", "data", "sparsity", "config", "storage", "versions"},
    "launch": {"models", "layers", "config", "storage", "versions"},
    "cli": {
        *("training", "data", "evaluation", "export", "inference", "launch"),
        *("models", "ops", "config", "storage", "versions"),
    },
}
FILES = [*(ROOT / "slope_megatron").rglob("*.py"), *(ROOT / "kernels/slope_kernels").rglob("*.py")]


def part(module: str) -> str | None:
    """`slope_megatron.ops.backend` -> `ops`; `slope_kernels.triton` -> `slope_kernels`; ours only."""
    head, *rest = module.split(".")
    if head == "slope_kernels":
        return head
    return rest[0] if head == "slope_megatron" and rest else None


def part_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return part(".".join(parts[1:] if parts[0] == "kernels" else parts))


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: use absolute imports"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(path: Path, here: str | None) -> list[str]:
    """What one file imports that its part may not."""
    found = []
    for lineno, target in imports(path):
        where = f"{path.name}:{lineno}"
        if target.split(".")[0] == "kernels":
            found.append(f"{where}: `kernels` is Hugging Face's package; import slope_kernels")
        there = part(target)
        known = here in MAY_IMPORT and there in MAY_IMPORT and here != there
        if known and there not in MAY_IMPORT[here]:
            found.append(f"{where}: {here} may not import {target}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    assert not violations(path, part_of(path))


def test_a_planted_fault_is_found(tmp_path):
    """The check itself can fail."""
    path = tmp_path / "pattern.py"
    path.write_text("import torch\nfrom slope_megatron.ops import backend\nimport kernels.slope_kernels\n")
    assert [line.split(": ")[0] for line in violations(path, "sparsity")] == ["pattern.py:2", "pattern.py:3"]


def test_every_package_is_listed_in_setup_cfg():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    listed = set(cfg["options"]["packages"].split())
    packages = (path.parent.relative_to(ROOT).parts for path in FILES if path.name == "__init__.py")
    found = {".".join(parts).removeprefix("kernels.") for parts in packages}
    assert found == listed, f"setup.cfg [options] packages differs from the tree: {found ^ listed}"
