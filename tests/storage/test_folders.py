"""Links and mounted disks are followed, never replaced; what is no folder is one sentence."""

import errno
import os

import pytest

from slope_megatron.storage import folders


@pytest.fixture
def home(tmp_path):
    """A small disk with a link, `data`, to a folder on a large one."""
    (tmp_path / "scratch" / "data").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "data").symlink_to(tmp_path / "scratch" / "data")
    return tmp_path / "home"


def filled(folder, **contents):
    folder.mkdir(parents=True)
    for name, text in contents.items():
        (folder / name).write_text(text)
    return folder


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_link_is_followed(home):
    target = folders.output_folder(home / "data", "--out")
    assert target == home.parent / "scratch" / "data"
    assert folders.output_folder(home / "data" / "new", "--out") == target / "new"
    folders.put(filled(target.with_name("half"), seal="new"), target, "seal")
    assert (home / "data").is_symlink() and texts(home / "data") == {"seal": "new"}
    assert sorted(path.name for path in target.parent.iterdir()) == ["data"]


def test_what_is_no_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to("/no/such/folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in (
        ("file", "is a file; give the path of a folder"),
        ("nowhere", "is a link to /no/such/folder, which does not exist; make that folder, or give another path"),
        ("loop", "is a link that leads back to itself; make it point to a folder, or give another path"),
    ):
        for path in (tmp_path / name, tmp_path / name / "below"):
            with pytest.raises(ValueError) as refused:
                folders.output_folder(path, "--out")
            where = path if path == tmp_path / name else f"{path}: {tmp_path / name}"
            assert str(refused.value) == f"--out {where} {said}"


@pytest.mark.parametrize("number", sorted(folders.NO_RENAME), ids=lambda number: errno.errorcode[number])
def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch, caplog, number):
    """A mounted disk, a container's lower layer: the seal comes last, and nothing old stays."""
    target = filled(tmp_path / "target", seal="old", other="old")
    finished = filled(tmp_path / "finished", seal="new", a="1", z="2")
    rename, order = os.rename, []

    def refused(source, destination):
        if destination == target or source == target:
            raise OSError(number, os.strerror(number))
        order.append(os.path.basename(destination))
        rename(source, destination)

    monkeypatch.setattr(folders.os, "rename", refused)
    before = target.stat().st_ino
    folders.put(finished, target, "seal")
    assert texts(target) == {"seal": "new", "a": "1", "z": "2"}
    assert target.stat().st_ino == before and not finished.exists()
    named = [name for name in order if not name.endswith(".partial")]
    assert sorted(named[:2]) == ["a", "z"] and named[2:] == ["seal"]
    assert "it is filled file by file" in caplog.text


def test_another_error_leaves_what_was_there(tmp_path, monkeypatch):
    target, finished = filled(tmp_path / "target", seal="old"), filled(tmp_path / "finished", seal="new")
    rename = os.rename

    def refused(source, destination):
        if source == finished:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(folders.os, "rename", refused)
    with pytest.raises(OSError, match="Input/output error"):
        folders.put(finished, target, "seal")
    assert texts(target) == {"seal": "old"}


def test_emptying_and_removing_keep_links_and_what_they_point_to(home):
    run = home / "data"
    large = filled(home.parent / "large", old="checkpoint")
    (run / "checkpoints").symlink_to(large)
    filled(home.parent / "texts", mine="keep")
    (run / "texts").symlink_to(home.parent / "texts")
    (run / "lock").write_text("")
    folders.empty(run, keep=("lock",), follow=("checkpoints",))
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "lock"]
    assert large.is_dir() and not texts(large) and texts(home.parent / "texts") == {"mine": "keep"}
    folders.remove(run)
    assert run.is_symlink() and run.is_dir() and not any(run.iterdir())
    folders.remove(run.resolve())
    assert not run.exists()


def test_what_tells_whose_folder_it_is_goes_last(tmp_path, monkeypatch):
    run = filled(tmp_path / "run", **{"run.json": "", "summary.json": "", "zero": ""})
    gone = []
    monkeypatch.setattr(type(run), "unlink", lambda path: gone.append(path.name))
    folders.empty(run, last="run.json")
    assert gone[-1] == "run.json" and len(gone) == 3
