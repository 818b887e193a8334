"""Disks without room or without the right to write: refused before a run, survived within it."""

import os
import shutil
import subprocess

import pytest
import torch

from helpers.models import build_engine, small_config, step_batches
from slope_megatron.config import TrainConfig


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this machine lets us mount nothing: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_run_that_cannot_fit_is_refused(small_disk):
    from slope_megatron.training.checkpoint.disk import check_space

    mib = 2**20
    train = TrainConfig(steps=100, save_interval=10, keep_checkpoints=2)
    check_space(small_disk, mib, train, 0, [])
    # Two are kept while a third is written: 4.5 MiB.
    with pytest.raises(
        ValueError, match=r"free and the run needs about 0\.00439: a checkpoint takes .*, 3 are there at"
    ):
        check_space(small_disk, mib * 3 // 2, train, 0, [])
    check_space(small_disk, mib * 3 // 2, train, 80, [])
    for_ever = TrainConfig(steps=100, save_interval=10, keep_checkpoints=1, keep_every=20)
    with pytest.raises(ValueError, match=r"and 5 for ever \(--keep-every 20\); free some space, keep fewer, or give"):
        check_space(small_disk, mib, for_ever, 0, [])
    # Where the model changes its form one is written, and asked for, whatever the interval.
    unsaved = TrainConfig(steps=100, save_interval=0, keep_checkpoints=1)
    check_space(small_disk, 5 * mib, unsaved, 50, [50])
    with pytest.raises(ValueError, match=r"the run needs about 0\.00488: a checkpoint takes 0\.00488, 1 are there at"):
        check_space(small_disk, 5 * mib, unsaved, 0, [50])


def test_a_read_only_place_is_refused(small_disk):
    from slope_megatron.training.checkpoint.disk import probe

    probe(small_disk / "not" / "yet" / "there")
    assert not list(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(
        ValueError, match=rf"{small_disk} cannot be written \(Read-only file system\): make it writable"
    ):
        probe(small_disk / "not" / "yet" / "there")


def save_around_a_full_disk(run, filler):
    """Save, fill the disk, fail to save in the background, free the disk, save again; returns what is there then."""
    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import store
    from slope_megatron.training.checkpoint.saver import Saver

    config = small_config(layers=1)
    engine = build_engine(config, torch.float32)
    saver = Saver(engine, run)
    failures = []
    for step in range(3):
        engine.train_step(step_batches(config, step, 0, 1))
        if step == 1:
            free = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
            filler.write_bytes(bytes(max(0, free - 300_000)))
        saver.save()
        saver.finish()
        failures.append(saver.failure)
        assert not list((run / "checkpoints").glob("*.partial"))
        filler.unlink(missing_ok=True)
    for folder in store.complete_checkpoints(run):
        assert sums.find_damage(folder) is None
    return failures, [folder.name for folder in store.complete_checkpoints(run)]


def test_a_save_that_fills_the_disk_harms_nothing(ranks, small_disk):
    run = small_disk / "run"
    run.mkdir()
    [(failures, names)] = ranks.run(save_around_a_full_disk, run, small_disk / "filler", world=1)
    assert failures[0] is None and failures[2] is None
    assert failures[1] == "rank 0: No space left on device"
    assert names == ["step_00000001", "step_00000003"]
    assert shutil.disk_usage(small_disk).free > 0
