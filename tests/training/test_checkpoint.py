"""Checkpoints: resume to the bit at the same layout, refuse what is corrupt or of another run, lose nothing."""

import json

import pytest
import torch

from helpers.models import VOCABULARY, small_config, step_batches

SLOPE = {"adapter_rank": 4, "lazy_fraction": 0.5, "backward_mask_interval": 4}


def build_engine(config, dtype):
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.engine import Engine

    return Engine(build_model(config, VOCABULARY, dtype), config, dtype)


def train(engine, config, until, save_at=(), run=None):
    from megatron.core import parallel_state

    from slope_megatron.training import checkpoint

    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    results = []
    while engine.steps_done < until:
        result = engine.train_step(step_batches(config, engine.steps_done, replica, replicas))
        results.append((result.loss, result.grad_norm))
        if engine.steps_done in save_at:
            checkpoint.save(engine, run)
    return results


def state_of(engine):
    """Everything that the next step depends on, as this rank holds it."""
    model = {name: tensor.clone() for name, tensor in engine.model.state_dict().items() if tensor is not None}
    base = engine.optimizer.optimizer
    optimizer = [
        (
            group["name"],
            partition.detach().clone(),
            {key: value.clone() for key, value in base.state[partition].items()},
        )
        for group in base.param_groups
        for partition in group["params"]
    ]
    return model, optimizer


def uninterrupted(config, dtype, run, save_at):
    engine = build_engine(config, dtype)
    results = train(engine, config, 10, save_at, run)
    return results, state_of(engine)


def resumed(config, dtype, run, step):
    from slope_megatron.training import checkpoint

    engine = build_engine(config, dtype)
    folder = checkpoint.folder_of(run, step)
    checkpoint.read_state(folder, config)
    # Garbage everywhere: what is right afterwards came from the files.
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(7.0)
        for name, buffer in engine.model.named_buffers():
            if name.endswith(("_pattern", "_column")):
                buffer.fill_(255)
    checkpoint.load(engine, folder)
    return train(engine, config, 10), state_of(engine)


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name
    for (name, partition, state), (_, expected_partition, expected_state) in zip(found[1], expected[1], strict=True):
        assert torch.equal(partition, expected_partition), f"masters of {name}"
        for key, value in expected_state.items():
            assert torch.equal(state[key], value), f"{key} of {name}"


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
    for step in (3, 5, 7):
        found = ranks.run(resumed, config, dtype, tmp_path, step, **layout)
        for (results, state), (expected_results, expected_state) in zip(found, expected, strict=True):
            assert results == expected_results[step:]
            assert_same(state, expected_state)


def saved_run(config, run):
    engine = build_engine(config, torch.float32)
    train(engine, config, 3, (1, 2, 3), run)


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
    from slope_megatron.training import checkpoint

    names = [folder.name for folder in checkpoint.complete_checkpoints(run_folder)]
    assert names == ["step_00000002", "step_00000003"]
    assert checkpoint.newest(run_folder).name == "step_00000003"
    assert not list((run_folder / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_corrupt_checkpoint_is_named_with_the_way_out(run_folder, tmp_path, damage):
    from slope_megatron.training import checkpoint

    run = copy_of(run_folder, tmp_path)
    folder = checkpoint.newest(run)
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
        checkpoint.read_state(folder, small_config(steps=10))
    assert victim.name in str(error.value)
    assert f"remove {folder} to resume from step_00000002" in str(error.value)
    import shutil

    shutil.rmtree(folder)
    assert checkpoint.newest(run).name == "step_00000002"


def test_a_half_written_checkpoint_does_not_count(run_folder, tmp_path):
    from slope_megatron.training import checkpoint

    run = copy_of(run_folder, tmp_path)
    partial = run / "checkpoints" / "step_00000009.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    assert checkpoint.newest(run).name == "step_00000003"


def test_a_checkpoint_of_another_model_is_refused(run_folder):
    from slope_megatron.training import checkpoint

    folder = checkpoint.newest(run_folder)
    with pytest.raises(ValueError, match=r"of another run \(slope.nm: '2:4' then, '1:2' now\)"):
        checkpoint.read_state(folder, small_config(steps=10, slope={"nm": "1:2"}))
    with pytest.raises(ValueError, match=r"train.steps: 10 then, 11 now"):
        checkpoint.read_state(folder, small_config(steps=11))
    assert checkpoint.read_state(folder, small_config(steps=10, log_interval=3))["steps_done"] == 3


def test_nothing_to_resume_from(tmp_path):
    from slope_megatron.training import checkpoint

    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        checkpoint.newest(tmp_path)


def test_the_manifest_covers_every_file(run_folder):
    from slope_megatron.training import checkpoint

    folder = checkpoint.newest(run_folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_only_rank_0_writes_the_index(tmp_path):
    from slope_megatron.training.snapshot import Snapshot

    snapshot = object.__new__(Snapshot)
    snapshot.rank, snapshot.metadata = 1, None
    with pytest.raises(RuntimeError, match="rank 1 does not know where all tensors lie: rank 0 writes the index"):
        snapshot.write_index(tmp_path, [])
    assert not any(tmp_path.iterdir())


def saved_in_the_background(config, run, dtype):
    """Saves of steps 2 and 4 by thread while steps go on; the writer is held until two more steps are done."""
    import threading

    from slope_megatron.training.saver import Saver
    from slope_megatron.training.snapshot import Snapshot

    engine = build_engine(config, dtype)
    saver, gate, original = Saver(engine, run), threading.Event(), Snapshot.write
    Snapshot.write = lambda self, folder: (gate.wait(), original(self, folder))[1]
    results = []
    for until in (2, 4):
        results += train(engine, config, until)
        gate.clear()
        saver.save()
        results += train(engine, config, until + 1)
        assert saver.busy() and not (run / "checkpoints" / f"step_{until:08d}").exists()
        gate.set()
    saver.finish()
    assert saver.failure is None and not saver.pending
    return results + train(engine, config, 10), state_of(engine)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
def test_steps_do_not_leak_into_a_save_that_is_still_being_written(ranks, tmp_path, dtype):
    config = small_config(slope=SLOPE, steps=10, tensor_parallel=2)
    layout = {"world": 2, "tensor_parallel": 2}
    expected = ranks.run(saved_in_the_background, config, tmp_path, dtype, **layout)
    for step in (2, 4):
        found = ranks.run(resumed, config, dtype, tmp_path, step, **layout)
        for (results, state), (expected_results, expected_state) in zip(found, expected, strict=True):
            assert results == expected_results[step:]
            assert_same(state, expected_state)


def save_a_state_that_is_not_finite(config, run):
    from slope_megatron.training import checkpoint

    engine = build_engine(config, torch.float32)
    train(engine, config, 1, (1,), run)
    with torch.no_grad():
        engine.optimizer.optimizer.param_groups[0]["params"][0].view(-1)[7] = torch.nan
    engine.steps_done = 2
    with pytest.raises(OSError, match=r"could not be written: rank 0: optimizer\.fp32\..* holds numbers that are not"):
        checkpoint.save(engine, run)
    return [folder.name for folder in checkpoint.complete_checkpoints(run)], sorted(
        path.name for path in (run / "checkpoints").iterdir()
    )


def test_a_state_that_is_not_finite_is_never_written(ranks, tmp_path):
    [(complete, names)] = ranks.run(save_a_state_that_is_not_finite, small_config(layers=1), tmp_path, world=1)
    assert complete == ["step_00000001"] and names == ["latest", "step_00000001"]


def sealed(run, *steps):
    """Checkpoints of two small files."""
    from slope_megatron.training import checkpoint, files

    for step in steps:
        partial = checkpoint.folder_of(run, step).with_suffix(".partial")
        partial.mkdir(parents=True)
        state = {"format": 1, "steps_done": step, "config": small_config().to_dict()}
        (partial / "state.json").write_text(json.dumps(state))
        (partial / "data.distcp").write_bytes(bytes(100))
        manifest = {path.name: files.seal(path) for path in partial.iterdir()}
        checkpoint.publish(partial, checkpoint.folder_of(run, step), manifest)


def steps_of(run):
    from slope_megatron.training import checkpoint

    return [int(folder.name.removeprefix("step_")) for folder in checkpoint.complete_checkpoints(run)]


def test_every_nth_checkpoint_is_kept_for_ever(tmp_path):
    from slope_megatron.training import checkpoint

    for step in range(1, 11):
        sealed(tmp_path, step)
        checkpoint.prune(tmp_path, 2, 4)
    assert steps_of(tmp_path) == [4, 8, 9, 10]
    checkpoint.prune(tmp_path, 1, None)
    assert steps_of(tmp_path) == [10]


def test_leftovers_are_removed_and_checkpoints_are_not(tmp_path):
    from slope_megatron.training import checkpoint

    sealed(tmp_path, 2, 4)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000006.partial").mkdir()
    (folder / "step_00000006.partial" / "__0_0.distcp").write_bytes(bytes(10))
    (folder / "latest.partial").write_text("step_00000006")
    (folder / "step_00000003.corrupt").mkdir()
    checkpoint.remove_partial(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step_00000002", "step_00000003.corrupt", "step_00000004"]


def test_saving_a_step_again_replaces_it_in_one_rename(tmp_path):
    from slope_megatron.training import checkpoint

    sealed(tmp_path, 2)
    sealed(tmp_path, 2)
    assert steps_of(tmp_path) == [2]
    checkpoint.verify(checkpoint.newest(tmp_path))
    checkpoint.remove_partial(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]


@pytest.mark.parametrize("name", ["step_00000004.partial", "step_00000004.old.partial", "step_00000004.corrupt"])
def test_what_is_no_checkpoint_any_more_or_not_yet_is_nobodys(tmp_path, name):
    """Sealed, but killed before its name was given to it; or set aside."""
    import dataclasses

    from slope_megatron.export import trained_run
    from slope_megatron.training.run_folder import is_resumed

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
    from slope_megatron.training import checkpoint

    sealed(tmp_path, 2, 4, 6)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000006" / "data.distcp").write_bytes(bytes(99))
    (folder / "step_00000004" / "manifest.json").write_text('{"state.js')
    other = small_config(slope={"nm": "1:2"})
    with pytest.raises(ValueError, match="of another run"):
        checkpoint.newest_good(tmp_path, other)
    assert steps_of(tmp_path) == [2, 4, 6], "nothing is touched for a run that may not go on"
    assert checkpoint.newest_good(tmp_path, small_config()).name == "step_00000002"
    assert steps_of(tmp_path) == [2]
    assert "step_00000006 is corrupt (its file data.distcp has 99 bytes instead of 100): set aside" in caplog.text
    assert "step_00000004 is corrupt (its file manifest.json cannot be read): set aside" in caplog.text
    (folder / "step_00000002" / "state.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint of .* is intact \(1 looked at\): start anew with --overwrite"):
        checkpoint.newest_good(tmp_path, small_config())
    assert steps_of(tmp_path) == [2], "the last one is not set aside: nothing would be left to look at"
