"""`latest` may be damaged in any way: the newest complete checkpoint is found, and one line says why."""

import pytest

from slope_megatron.storage import latest


@pytest.fixture
def complete(tmp_path):
    folders = [tmp_path / "checkpoints" / f"step_{step:08d}" for step in (2, 4)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    return folders


DAMAGE = {
    "bad bytes": (b"\xff\xfe\0step", r"names '.+', which is no complete checkpoint"),
    "empty": (b"", "is empty"),
    "nuls": (bytes(13), r"names .+, which is no complete checkpoint"),
    "no checkpoint": (b"../../run.json\n", "names '../../run.json', which is no complete checkpoint"),
    "missing": (b"step_00000006\n", "names 'step_00000006', which is no complete checkpoint"),
    "folder": (None, "cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", ["resume", "export"])
def test_a_damaged_pointer_is_passed_over(complete, caplog, damage, reader):
    from slope_megatron.export.trained_run import find_checkpoint
    from slope_megatron.training.checkpoint.store import newest

    run = complete[0].parent.parent
    content, said = DAMAGE[damage]
    pointer = run / "checkpoints" / "latest"
    pointer.mkdir() if content is None else pointer.write_bytes(content)
    assert {"resume": newest, "export": find_checkpoint}[reader](run) == complete[1]
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(str(pointer)) and line.endswith("taking the newest complete checkpoint, step_00000004")
    if ".+" not in said:
        assert f" {said}:" in line


def test_a_pointer_that_is_gone_is_said(complete, caplog):
    assert latest.find(complete) == complete[1]
    assert "latest is gone: taking the newest complete checkpoint, step_00000004" in caplog.text


def test_an_earlier_checkpoint_may_be_named(complete, caplog):
    latest.point_at(complete[0])
    assert latest.find(complete) == complete[0] and not caplog.records


def test_a_folder_in_its_place_does_not_keep_checkpoints_from_being_published(complete, caplog):
    pointer = complete[0].with_name("latest")
    pointer.mkdir()
    (pointer / "thesis.tex").write_text("do not lose me")
    latest.point_at(complete[1])
    assert pointer.read_text() == "step_00000004\n"
    assert (pointer.with_name("earlier") / "latest-1" / "thesis.tex").read_text() == "do not lose me"
    assert "a folder is where the name of the newest checkpoint belongs" in caplog.text
