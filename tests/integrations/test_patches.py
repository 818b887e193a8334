"""The patches: their form, and that they apply, repeat and undo on files of the blobs they name."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "patches"
PATCHES = sorted(FOLDER.rglob("*.patch"))
# A checkout at hand, to apply to: CHECKOUTS/<project>/...
CHECKOUTS = os.environ.get("SLOPE_UPSTREAM_CHECKOUTS", "")


def load():
    """patches/apply has no .py."""
    loader = importlib.machinery.SourceFileLoader("apply", str(FOLDER / "apply"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("apply", loader))
    loader.exec_module(module)
    return module


apply = load()
OURS = "import slope\n"
# Each patch's added lines, by git's name of them, and the result that it names for them. Both change together: the name
# of the result can only be computed with the upstream's file, and `patches/apply` refuses a patch whose name is stale.
ADDED = {
    "megatron-deepspeed/main_4efb479d/pretrain_gpt.patch": (
        "410b6935b5e2f1336783b529224c961d2cc7d6d6",
        "aa3f00777e327aafc72d7d0a3ad7ccfded8bffa7",
    ),
    "megatron-lm/core_v0.16.1/pretrain_bert.patch": (
        "8b666542afa4b77637b9fef38250ed591eecd3eb",
        "18bfe9fee74a7bcba337ed356f536d2da77aff03",
    ),
    "megatron-lm/core_v0.16.1/pretrain_gpt.patch": (
        "bd224e40fb247097052dc632399ec8f04f9bf49f",
        "14cc8a869f13a190b9f93161134fe98298dc46f9",
    ),
    "megatron-lm/core_v0.17.1/pretrain_gpt.patch": (
        "bd224e40fb247097052dc632399ec8f04f9bf49f",
        "5b1c61e04eafb30f285047fe4b2639bd50a16569",
    ),
    "megatron-lm/core_v0.17.1/pretrain_bert.patch": (
        "8b666542afa4b77637b9fef38250ed591eecd3eb",
        "2fc08f4f967feed079a942b03cff59841300d610",
    ),
    "megatron-lm/core_v0.18.2/pretrain_gpt.patch": (
        "bd224e40fb247097052dc632399ec8f04f9bf49f",
        "44cbb2ea107e22916b292c49e487b907f342a85e",
    ),
    "megatron-lm/core_v0.19.0/pretrain_gpt.patch": (
        "bd224e40fb247097052dc632399ec8f04f9bf49f",
        "71f2e3f99166eb51c03becfece7b6bf6d75e2aaf",
    ),
    "megatron-lm/main_d98e8a64/pretrain_gpt.patch": (
        "bd224e40fb247097052dc632399ec8f04f9bf49f",
        "7e287e1f825d41c3a672fc4bd3fb45c5ac1163d2",
    ),
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A project of one file, with a patch for it."""
    old = b"import os\n\nprint(1)\n"
    new = b"import os\n\nimport slope\nprint(1)\n"
    (tmp_path / "patches" / "up" / "v1").mkdir(parents=True)
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "a.py").write_bytes(old)
    text = f"index {apply.blob(old)}..{apply.blob(new)} 100644\n--- a/a.py\n+++ b/a.py\n@@ -2,0 +3 @@\n+{OURS}"
    (tmp_path / "patches" / "up" / "v1" / "a.patch").write_text(text)
    monkeypatch.setattr(apply, "FOLDER", tmp_path / "patches")
    return tmp_path / "checkout" / "a.py", old, new


def run(path, **keywords):
    return apply.run("up", path.parent, **{"undo": False, "check": False, **keywords})


def test_applying_twice_is_once_and_undoing_restores(made):
    path, old, new = made
    assert run(path, check=True) == ["a.py: would be added (v1)"] and path.read_bytes() == old
    assert run(path) == ["a.py: added (v1)"] and path.read_bytes() == new
    assert run(path) == ["a.py: there already (v1)"] and path.read_bytes() == new
    assert run(path, check=True) == ["a.py: there already (v1)"]
    assert run(path, check=True, undo=True) == ["a.py: would be taken out (v1)"] and path.read_bytes() == new
    assert run(path, undo=True) == ["a.py: taken out (v1)"] and path.read_bytes() == old
    assert run(path, undo=True) == ["a.py: not there (v1)"]


def test_another_file_is_refused_naming_both_blobs(made):
    path, old, _ = made
    path.write_bytes(b"print(2)\n")
    with pytest.raises(ValueError) as error:
        run(path)
    assert apply.blob(b"print(2)\n") in str(error.value) and apply.blob(old) in str(error.value)
    assert path.read_bytes() == b"print(2)\n"


@pytest.mark.parametrize(
    ("project", "checkout", "message"),
    [("down", "checkout", "there are no patches for 'down'"), ("up", ".", "holds no file that is patched (a.py)")],
)
def test_wrong_arguments_are_refused(made, project, checkout, message):
    with pytest.raises(ValueError) as error:
        apply.run(project, made[0].parent.parent / checkout, undo=False, check=False)
    assert message in str(error.value)


def test_blobs_are_git_s():
    assert apply.blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_patches_only_add_and_name_what_they_are_for(path):
    """No line of the upstream's is in this repository: no context, nothing removed."""
    patch = apply.Patch(path)
    text = path.read_text()
    assert patch.hunks and "commit " in text and "licence" in text
    assert not [line for line in text.splitlines() if line.startswith(("-", " ")) and not line.startswith("--- a/")]
    assert path.parent.name in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_added_lines_and_the_result_s_name_change_together(path):
    patch = apply.Patch(path)
    added = "".join(line for _, lines in patch.hunks for line in lines)
    assert ADDED[str(path.relative_to(FOLDER))] == (apply.blob(added.encode()), patch.after)


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_patches_import_what_there_is(path):
    added = [line.strip() for _, lines in apply.Patch(path).hunks for line in lines]
    imports = [re.match(r"from (slope_megatron\S*) import (\w+)", line) for line in added]
    found = [match.groups() for match in imports if match]
    assert found
    for module, name in found:
        place = FOLDER.parent / module.replace(".", "/")
        assert (place / f"{name}.py").is_file() or f"def {name}(" in place.with_suffix(".py").read_text()


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_patches_apply_to_the_upstream(path, tmp_path):
    patch = apply.Patch(path)
    found = [file for file in Path(CHECKOUTS or "/nowhere").glob(f"*/{patch.file}")]
    found = [file for file in found if apply.blob(file.read_bytes()) == patch.before]
    if not found:
        pytest.skip(f"no checkout with blob {patch.before[:12]} of {patch.file} in $SLOPE_UPSTREAM_CHECKOUTS")
    copy = Path(shutil.copy(found[0], tmp_path))
    project = path.relative_to(FOLDER).parts[0]
    apply.run(project, tmp_path, undo=False, check=False)
    assert apply.blob(copy.read_bytes()) == patch.after
    apply.run(project, tmp_path, undo=True, check=False)
    assert apply.blob(copy.read_bytes()) == patch.before
