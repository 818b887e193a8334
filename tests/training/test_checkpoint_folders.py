"""The folder of checkpoints: which are kept, set aside, replaced and removed."""

import json

import pytest

from helpers.models import small_config


def sealed(run, *steps):
    """Checkpoints of two small files."""
    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import store

    for step in steps:
        partial = store.folder_of(run, step).with_suffix(".partial")
        partial.mkdir(parents=True)
        state = {"format": 1, "steps_done": step, "config": small_config().to_dict()}
        (partial / "state.json").write_text(json.dumps(state))
        (partial / "data.distcp").write_bytes(bytes(100))
        manifest = {path.name: sums.seal(path) for path in partial.iterdir()}
        store.publish(partial, store.folder_of(run, step), manifest)


def steps_of(run):
    from slope_megatron.training.checkpoint import store

    return [int(folder.name.removeprefix("step_")) for folder in store.complete_checkpoints(run)]


def test_every_nth_checkpoint_is_kept_for_ever(tmp_path):
    from slope_megatron.training.checkpoint import store

    for step in range(1, 11):
        sealed(tmp_path, step)
        store.prune(tmp_path, 2, 4)
    assert steps_of(tmp_path) == [4, 8, 9, 10]
    store.prune(tmp_path, 1, None)
    assert steps_of(tmp_path) == [10]


def test_leftovers_are_removed_and_checkpoints_are_not(tmp_path):
    from slope_megatron.training.checkpoint import store

    sealed(tmp_path, 2, 4)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000006.partial").mkdir()
    (folder / "step_00000006.partial" / "__0_0.distcp").write_bytes(bytes(10))
    (folder / "latest.partial").write_text("step_00000006")
    (folder / "step_00000003.corrupt").mkdir()
    store.remove_partial(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step_00000002", "step_00000003.corrupt", "step_00000004"]


def test_saving_a_step_again_replaces_it_in_one_rename(tmp_path):
    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import store

    sealed(tmp_path, 2)
    sealed(tmp_path, 2)
    assert steps_of(tmp_path) == [2]
    assert sums.find_damage(store.newest(tmp_path)) is None
    store.remove_partial(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]


@pytest.mark.parametrize("name", ["step_00000004.partial", "step_00000004.old.partial"])
def test_what_is_no_checkpoint_any_more_or_not_yet_is_nobodys(tmp_path, name):
    """Sealed, but killed before its name was given to it."""
    import dataclasses

    from slope_megatron.export import trained_run
    from slope_megatron.training.checkpoint.run_folder import is_resumed

    config = small_config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, out=str(tmp_path), auto_resume=True))
    folder = tmp_path / "checkpoints"
    sealed(tmp_path, 4)
    (folder / "step_00000004").rename(folder / name)
    assert not is_resumed(config), "an unattended job starts, and does not end at a checkpoint that is none"
    sealed(tmp_path, 2)
    (folder / "latest").write_text("step_00000004\n")
    assert is_resumed(config)
    assert trained_run.find_checkpoint(tmp_path).name == "step_00000002"
    with pytest.raises(ValueError, match="has no checkpoint of step 4: it has those of 2"):
        trained_run.find_checkpoint(tmp_path, 4)


def test_an_unattended_job_takes_the_newest_intact_checkpoint(tmp_path, caplog):
    from slope_megatron.training.checkpoint import recovery

    sealed(tmp_path, 2, 4, 6)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000006" / "data.distcp").write_bytes(bytes(99))
    (folder / "step_00000004" / "manifest.json").write_text('{"state.js')
    other = small_config(slope={"nm": "1:2"})
    with pytest.raises(ValueError, match="of another run"):
        recovery.newest_good(tmp_path, other)
    assert steps_of(tmp_path) == [2, 4, 6], "nothing is touched for a run that may not go on"
    assert recovery.newest_good(tmp_path, small_config()).name == "step_00000002"
    assert steps_of(tmp_path) == [2]
    assert "step_00000006 is corrupt: its file data.distcp has 99 bytes instead of 100: set aside" in caplog.text
    assert "step_00000004 is corrupt: its file manifest.json cannot be read: set aside" in caplog.text
    (folder / "step_00000002" / "state.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint of .* is intact \(1 looked at, 2 set aside before\): give"):
        recovery.newest_good(tmp_path, small_config())
    assert steps_of(tmp_path) == [2], "the last one is not set aside: nothing would be left to look at"
