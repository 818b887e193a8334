"""Checkpoints that another version wrote: resumed, and started from, where their settings mean the same here."""

import dataclasses
import shutil

import pytest
import torch

from helpers.models import build_engine, save, small_config, step_batches
from helpers.runs import edit_state


def saved_run(config, run):
    engine = build_engine(config, torch.float32)
    engine.train_step(step_batches(config, 0, 0, 1))
    save(engine, run)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    ranks.run(saved_run, small_config(steps=10), run, world=1)
    return run


@pytest.fixture
def folder(saved, tmp_path):
    from slope_megatron.training.checkpoint import store

    return store.newest(shutil.copytree(saved, tmp_path / "run"))


def test_a_run_goes_on_after_an_upgrade(folder):
    """Neither `--resume` nor `--auto-resume` minds settings that the checkpoint is older than."""
    from slope_megatron.training.checkpoint import recovery, store

    edit_state(folder, slope={"fp8": ..., "fp8_wgrad": ...}, optimizer={"lamb_trust_no_decay": ...}, watch=None)
    config = small_config(steps=10)
    assert store.check_state(folder, config)["steps_done"] == 1
    assert recovery.newest_good(folder.parent.parent, config) == folder
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lamb_trust_no_decay=True))
    with pytest.raises(ValueError, match=r"of another run \(optimizer.lamb_trust_no_decay: False then, True now\)"):
        store.check_state(folder, other)


def test_a_run_does_not_go_on_where_a_setting_cannot_be_obeyed(folder):
    from slope_megatron.training.checkpoint import store

    edit_state(folder, parallel={"later": 1}, train={"z_loss": 0.0})
    config = small_config(steps=10)
    # What the writing version knew to have no effect is not in its list.
    assert store.check_state(folder, config)["steps_done"] == 1
    edit_state(folder, train={"z_loss": 0.5}, active=("train.z_loss",))
    with pytest.raises(ValueError, match=r"settings that this version does not have \(train.z_loss 0.5\)"):
        store.check_state(folder, config)


def test_init_from_reads_the_same_way(folder):
    from slope_megatron.training.checkpoint.init_from import check_init

    config = small_config(steps=10)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(folder)))
    edit_state(folder, slope={"dense_first_linear": ..., "lazy_fraction": ...}, model={"vocab_size": ...})
    check_init(config, samples=8)
    dense_first = dataclasses.replace(config, slope=dataclasses.replace(config.slope, dense_first_linear=False))
    with pytest.raises(ValueError, match=r"slope.dense_first_linear: True there, False here"):
        check_init(dense_first, samples=8)
    edit_state(folder, model={"next_tokens": True}, active=("model.next_tokens",))
    with pytest.raises(ValueError, match=r"settings that this version does not have \(model.next_tokens True\)"):
        check_init(config, samples=8)
