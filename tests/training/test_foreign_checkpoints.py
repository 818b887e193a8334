"""A planted pickle in a checkpoint is not run by a run that resumes from it or starts from it."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from helpers.models import VOCABULARY, build_engine, go_on, small_config
from helpers.payload import plant


def with_run(config, out, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, out=str(out), **train))


def two_runs(sparse, dense):
    for config in (sparse, dense):
        go_on(build_engine(config, torch.float32), 1, (1,), Path(config.train.out))


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """A sparse run and a dense one, of a step."""
    folder = tmp_path_factory.mktemp("runs")
    configs = [
        with_run(small_config(slope={"enabled": kind == "sparse"}), folder / kind) for kind in ("sparse", "dense")
    ]
    ranks.run(two_runs, *configs, world=1)
    return folder


def attempt(config, reader):
    """What a reader says; it reads behind whatever would find the damage first."""
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.checkpoint import init_from, recovery, store

    try:
        if reader == "resume":
            recovery.load(build_engine(config), store.newest(Path(config.train.out)))
        elif reader == "check":
            init_from.check_init(config, samples=8)
        else:
            init_from.load_init(build_model(config, VOCABULARY, torch.float32), config, VOCABULARY, dataset=None)
    except ValueError as error:
        return str(error)
    return "it was read"


@pytest.mark.parametrize(
    ("kind", "name", "reader"),
    [
        ("sparse", ".metadata", "resume"),
        ("sparse", "common.pt", "resume"),
        ("sparse", ".metadata", "check"),
        ("sparse", ".metadata", "load"),
        ("sparse", "common.pt", "load"),
        ("dense", ".metadata", "check"),
        ("dense", ".metadata", "load"),
    ],
)
def test_nothing_is_executed(ranks, runs, tmp_path, kind, name, reader):
    run = shutil.copytree(runs / kind, tmp_path / "run")
    plant(next((run / "checkpoints").glob("step_*")), name, tmp_path / "ran")
    config = small_config(slope={"enabled": kind == "sparse"}) if reader == "resume" else small_config()
    config = with_run(config, run) if reader == "resume" else with_run(config, tmp_path / "new", init_from=str(run))
    (said,) = ranks.run(attempt, config, reader, world=1)
    assert "nothing was executed; use a checkpoint whose origin you trust" in said
    assert not (tmp_path / "ran").exists()
