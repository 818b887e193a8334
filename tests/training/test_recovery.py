"""The checkpoint that an unattended job goes on from: never one that a rank cannot read, never none unasked."""

import dataclasses
import os
import shutil

import pytest
import torch
from test_checkpoint_folders import sealed, steps_of

from helpers.models import build_engine, go_on, small_config


def unattended(run, **train):
    config = small_config(**train)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, out=str(run), auto_resume=True))


def become_folder(path):
    path.unlink()
    path.mkdir()


def become_file(path):
    shutil.rmtree(path)
    path.write_text("a file")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda newest: become_folder(newest / "manifest.json"), "manifest.json cannot be read (Is a directory)"),
        (lambda newest: become_folder(newest / "state.json"), "state.json is no file"),
        (lambda newest: become_folder(newest / "data.distcp"), "data.distcp is no file"),
        (lambda newest: (newest / "data.distcp").unlink(), "data.distcp is missing"),
        (lambda newest: (newest / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda newest: (newest / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
        (lambda newest: (newest / "data.distcp").write_bytes(b"\1" * 100), "data.distcp has another checksum"),
        (become_file, "manifest.json is missing"),
    ],
)
def test_an_unreadable_newest_one_is_passed_over_and_kept(tmp_path, caplog, spoil, said):
    from slope_megatron.training.checkpoint import recovery

    sealed(tmp_path, 2, 4)
    newest = tmp_path / "checkpoints" / "step_00000004"
    spoil(newest)
    assert recovery.find_checkpoint(unattended(tmp_path), tmp_path).name == "step_00000002"
    lines = [line for line in caplog.messages if "step_00000004" in line]
    assert len(lines) == 1 and said in lines[0] and "set aside, taking the one before it" in lines[0]
    assert not newest.exists() and newest.with_name("step_00000004.corrupt").exists()


@pytest.mark.parametrize("code", [5, 13], ids=["EIO", "EACCES"])
@pytest.mark.parametrize("name", ["manifest.json", "data.distcp"])
def test_a_disk_that_fails(tmp_path, caplog, monkeypatch, code, name):
    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import recovery

    sealed(tmp_path, 2, 4)
    refuse_to_open(monkeypatch.setattr, sums, f"step_00000004/{name}", code)
    assert recovery.find_checkpoint(unattended(tmp_path), tmp_path).name == "step_00000002"
    assert f": its file {name} cannot be read ({os.strerror(code)}): set aside" in caplog.text


def refuse_to_open(set_attribute, module, ending, code):
    """Opening files whose path ends so fails as the kernel fails it."""
    import builtins
    from pathlib import Path

    def failing(path, *arguments, **options):
        if str(path).endswith(ending):
            raise OSError(code, os.strerror(code), str(path))
        return builtins.open(path, *arguments, **options)

    whole = Path.read_text
    set_attribute(module, "open", failing, raising=False)
    set_attribute(Path, "read_text", lambda self, *rest, **more: failing(self) and whole(self, *rest, **more))


def test_what_is_set_aside_twice_is_kept_twice(tmp_path):
    from slope_megatron.training.checkpoint import recovery

    for number in range(3):
        sealed(tmp_path, *([2, 4] if number == 0 else [4]))
        (tmp_path / "checkpoints" / "step_00000004" / "data.distcp").write_text(f"{number}")
        assert recovery.find_checkpoint(unattended(tmp_path), tmp_path).name == "step_00000002"
    aside = sorted((tmp_path / "checkpoints").glob("*.corrupt*"))
    assert [(path / "data.distcp").read_text() for path in aside] == ["0", "1", "2"]


def test_a_run_of_which_none_can_be_read_is_not_begun_anew(tmp_path, caplog):
    from slope_megatron.training.checkpoint import recovery, run_folder

    sealed(tmp_path, 2, 4)
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_0000000{step}" / "state.json").unlink()
    config = unattended(tmp_path)
    assert run_folder.is_resumed(config)
    with pytest.raises(
        ValueError, match=r"no checkpoint of .* is intact \(2 looked at\): give another --out, or start"
    ):
        recovery.find_checkpoint(config, tmp_path)
    assert steps_of(tmp_path) == [2, 4] and len(caplog.messages) == 2
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"step_0000000{step}"
        folder.rename(folder.with_name(f"{folder.name}.corrupt"))
    assert run_folder.is_resumed(config), "what was set aside is not deleted by a new start either"
    with pytest.raises(ValueError, match=r"is intact \(0 looked at, 2 set aside before\)"):
        recovery.find_checkpoint(config, tmp_path)


def test_checkpoints_that_cannot_be_listed(tmp_path):
    from slope_megatron.training.checkpoint import run_folder

    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(ValueError, match=r"checkpoints cannot be listed \(Not a directory\): make it readable"):
        run_folder.is_resumed(unattended(tmp_path))


def test_a_changed_description_of_the_run_is_told(tmp_path):
    from slope_megatron.storage import sums, whole
    from slope_megatron.training.checkpoint import run_folder

    whole.write_json(tmp_path / "run.json", sums.signed({"dtype": "bf16", "data_sha256": "5f"}))
    assert run_folder.saved_dtype(tmp_path) == "bf16"
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text.replace("bf16", "fp16"))
    with pytest.raises(ValueError, match=r"run.json is damaged \(it has another checksum\): copy it from a backup"):
        run_folder.saved_dtype(tmp_path)
    whole.write_json(tmp_path / "run.json", {"dtype": "bf16"})
    assert run_folder.saved_dtype(tmp_path) == "bf16", "written before it carried a sum"


# -- several ranks -----------------------------------------------------------------------------------------------------


def write_two(config, run):
    engine = build_engine(config, torch.float32)
    go_on(engine, 2, (1, 2), run)


def see_and_load(config, run, when):
    """What two ranks take when rank 1 alone cannot read a file of the newest: the step, and a weight's sum."""
    import torch.distributed as dist

    from slope_megatron.storage import sums, tensors
    from slope_megatron.training.checkpoint import recovery

    if dist.get_rank() == 1 and when == "verified":
        refuse_to_open(setattr_raw, sums, "step_00000002/.metadata", 5)
    folder = recovery.find_checkpoint(config, run)
    if dist.get_rank() == 1 and when == "loaded":
        whole = tensors.CheckedReader._slice_file

        def failing(self, file, info):
            if "step_00000002" in str(self.folder):
                raise OSError(5, os.strerror(5))
            return whole(self, file, info)

        tensors.CheckedReader._slice_file = failing
    engine = build_engine(config, torch.float32)
    loaded = recovery.load(engine, folder)
    total = sum(float(parameter.double().sum()) for parameter in engine.model.parameters())
    return loaded.name, engine.steps_done, total


def setattr_raw(target, name, value, raising=True):
    setattr(target, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["verified", "loaded"])
def test_what_one_rank_cannot_read_no_rank_takes(ranks, tmp_path, when):
    config = unattended(tmp_path, steps=4, keep_checkpoints=5)
    layout = {"world": 2, "tensor_parallel": 2}
    ranks.run(write_two, config, tmp_path, **layout)
    answers = ranks.run(see_and_load, config, tmp_path, when, **layout)
    assert [answer[:2] for answer in answers] == [("step_00000001", 1)] * 2
    assert (tmp_path / "checkpoints" / "step_00000002.corrupt").is_dir()
    assert ranks.run(see_and_load, config, tmp_path, "never", **layout) == answers


def say_finished(config):
    """What this rank hears of a run, and which weights it has read for that."""
    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import finished, run_folder

    read, original = [], sums.file_sums
    finished.has_summary = lambda *_: True
    run_folder.check_same_data = lambda *_: None
    sums.file_sums = lambda path, *rest: read.append(path.name) or original(path, *rest)
    return finished.finished(config), sorted(name for name in read if name.endswith(".distcp"))


@pytest.mark.slow
def test_ranks_share_the_reading_of_a_finished_run(ranks, tmp_path):
    config = unattended(tmp_path, stop_at=2, keep_checkpoints=5)
    layout = {"world": 2, "tensor_parallel": 2}
    ranks.run(write_two, config, tmp_path, **layout)
    written = {path.name for path in (tmp_path / "checkpoints" / "step_00000002").glob("*.distcp")}
    (said, first), (also_said, second) = ranks.run(say_finished, config, **layout)
    assert said == also_said and said.startswith(f"{tmp_path} was finished at step 2: nothing was changed")
    assert first and second and set(first) | set(second) == written and not set(first) & set(second)
    victim = tmp_path / "checkpoints" / "step_00000002" / second[0]
    victim.write_bytes(bytes(byte ^ 1 for byte in victim.read_bytes()))
    assert [said for said, _ in ranks.run(say_finished, config, **layout)] == [None, None]
