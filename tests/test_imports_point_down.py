"""Each part may import only the parts listed for it; the table is the architecture."""

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"config", "storage", "launch", "versions"}
MAY_IMPORT = {
    "slope_kernels": set(),
    "config": set(),
    "storage": {"config"},
    "launch": {"config", "storage"},
    "versions": set(),
    "sparsity": set(),
    "data": {"config", "storage"},
    "ops": {"slope_kernels", "sparsity", *LEAVES},
    "linear": {"ops", *LEAVES},
    "layers": {"linear", "ops", "sparsity", *LEAVES},
    "torch_layers": {"layers", "linear", "ops", "sparsity", *LEAVES},
    "inference": {"ops", "sparsity", *LEAVES},
    "models": {"layers", "sparsity", *LEAVES},
    "export": {"models", "data", "inference", "sparsity", *LEAVES},
    "training": {"models", "layers", "ops", "data", "sparsity", *LEAVES},
    "evaluation": {"training", "models", "layers", "data", "export", "inference", *LEAVES},
    "integrations": {"training", "export", "models", "layers", "data", *LEAVES},
    "planner": {"training", "models", *LEAVES},
    "preflight": {"planner", "models", *LEAVES},
    "bench": {
        *("integrations", "planner", "training", "models", "layers", "linear", "inference", "ops", "sparsity"),
        *("data", "slope_kernels", *LEAVES),
    },
    "study": {"bench", "evaluation", "planner", "training", "models", "data", *LEAVES},
    "cli": {
        *("bench", "study", "planner", "preflight", "integrations", "evaluation", "training", "export", "inference"),
        *("models", "ops", "data", *LEAVES),
    },
}
FILES = [*(ROOT / "slope_megatron").rglob("*.py"), *(ROOT / "kernels/slope_kernels").rglob("*.py")]


def part(module: str) -> str | None:
    """`slope_megatron.ops.backend` -> `ops`; `slope_kernels.triton` -> `slope_kernels`; ours only."""
    head, *rest = module.split(".")
    if head == "slope_kernels":
        return head
    return rest[0] if head == "slope_megatron" and rest and rest != ["__main__"] else None


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
        there = part(target) if not target.startswith("slope_megatron.__") else None
        if here is None or there is None or here == there:
            continue
        if not {here, there} <= MAY_IMPORT.keys():
            found.append(f"{where}: {here} imports {target}, and one of them is not in the table")
        elif there not in MAY_IMPORT[here]:
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


def test_a_part_that_is_not_in_the_table_is_found(tmp_path):
    path = tmp_path / "room.py"
    path.write_text("from slope_megatron.config import Config\n")
    assert violations(path, "room") and violations(path, "sparsity") and not violations(path, "models")
    assert {part_of(file) for file in FILES} - {None, "__init__"} == MAY_IMPORT.keys(), "the table is the architecture"


def test_every_package_is_listed_in_setup_cfg():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    listed = {name for name in cfg["options"]["packages"].split() if ".shipped." not in name}
    packages = (path.parent.relative_to(ROOT).parts for path in FILES if path.name == "__init__.py")
    found = {".".join(parts).removeprefix("kernels.") for parts in packages}
    assert found == listed, f"setup.cfg [options] packages differs from the tree: {found ^ listed}"
