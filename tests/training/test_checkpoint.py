"""Checkpoints: resume to the bit at the same layout, refuse what is corrupt or of another run."""

import json

import pytest
import torch

from helpers.models import build_engine, go_on, small_config
from helpers.resumed_runs import SLOPE, check_resumed, uninterrupted


# Step 3: in the middle of a column-pattern interval; 5: the step before the adapters' first; 7: adapters trained.
@pytest.mark.parametrize(
    ("dtype", "dropout"), [(torch.float32, 0.0), (torch.bfloat16, 0.1)], ids=["fp32", "bf16-dropout"]
)
def test_resume_is_exact(ranks, tmp_path, dtype, dropout):
    import dataclasses

    config = small_config(slope=SLOPE, steps=10, tensor_parallel=2, keep_checkpoints=9)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=dropout))
    layout = {"world": 4, "tensor_parallel": 2}
    expected = ranks.run(uninterrupted, config, dtype, tmp_path, (3, 5, 7), **layout)
    check_resumed(ranks, config, dtype, tmp_path, (3, 5, 7), expected, **layout)


def saved_run(config, run):
    engine = build_engine(config, torch.float32)
    go_on(engine, 3, (1, 2, 3), run)


@pytest.fixture(scope="module")
def run_folder(ranks, tmp_path_factory):
    """A run with checkpoints of steps 2 and 3 (two are kept)."""
    run = tmp_path_factory.mktemp("run")
    ranks.run(saved_run, small_config(steps=10), run, world=1)
    return run


def copy_of(run_folder, tmp_path):
    import shutil

    return shutil.copytree(run_folder, tmp_path / "run")


def test_the_newest_two_are_kept_and_the_tracker_names_the_last(run_folder):
    from slope_megatron.training.checkpoint import store

    names = [folder.name for folder in store.complete_checkpoints(run_folder)]
    assert names == ["step_00000002", "step_00000003"]
    assert store.newest(run_folder).name == "step_00000003"
    assert not list((run_folder / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_corrupt_checkpoint_is_named_with_the_way_out(run_folder, tmp_path, damage):
    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import store

    run = copy_of(run_folder, tmp_path)
    folder = store.newest(run)
    victim = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-1])
    else:
        victim.unlink()
    problem = {"flip": "another checksum", "cut": "bytes instead of", "remove": "is missing"}[damage]
    with pytest.raises(ValueError, match=problem) as error:
        store.refuse(folder, sums.find_damage(folder))
    assert victim.name in str(error.value)
    assert f"remove {folder} to resume from step_00000002" in str(error.value)
    import shutil

    shutil.rmtree(folder)
    assert store.newest(run).name == "step_00000002"


def test_a_half_written_checkpoint_does_not_count(run_folder, tmp_path):
    from slope_megatron.training.checkpoint import store

    run = copy_of(run_folder, tmp_path)
    partial = run / "checkpoints" / "step_00000009.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    assert store.newest(run).name == "step_00000003"


def test_a_checkpoint_of_another_model_is_refused(run_folder):
    from slope_megatron.training.checkpoint import store

    folder = store.newest(run_folder)
    with pytest.raises(ValueError, match=r"of another run \(slope.nm: '2:4' then, '1:2' now\)"):
        store.check_state(folder, small_config(steps=10, slope={"nm": "1:2"}))
    with pytest.raises(ValueError, match=r"train.steps: 10 then, 11 now"):
        store.check_state(folder, small_config(steps=11))
    assert store.check_state(folder, small_config(steps=10, log_interval=3))["steps_done"] == 3


def test_nothing_to_resume_from(tmp_path):
    from slope_megatron.training.checkpoint import store

    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        store.newest(tmp_path)


def test_the_manifest_covers_every_file(run_folder):
    from slope_megatron.training.checkpoint import store

    folder = store.newest(run_folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_only_rank_0_writes_the_index(tmp_path):
    from slope_megatron.training.checkpoint.snapshot import Snapshot

    snapshot = object.__new__(Snapshot)
    snapshot.rank, snapshot.metadata = 1, None
    with pytest.raises(RuntimeError, match="rank 1 does not know where all tensors lie: rank 0 writes the index"):
        snapshot.write_index(tmp_path, [])
    assert not any(tmp_path.iterdir())
