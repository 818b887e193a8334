"""A configuration that another version saved: absent settings, unknown ones, and what each reader makes of them."""

import dataclasses
import logging
from pathlib import Path

import pytest

from slope_megatron.config import Config, OptimizerConfig, SlopeConfig, TrainConfig, WatchConfig
from slope_megatron.config.fields import option
from slope_megatron.config.reader import SECTIONS
from slope_megatron.config.saved import FIXED_ON_RESUME, WEIGHTS, SavedConfig, saved_form

WHERE = Path("run/checkpoints/step_00000010")


def saved(config=None):
    return saved_form((config or Config()).to_dict())


def test_what_was_saved_is_what_is_read():
    config = Config(slope=SlopeConfig(nm="1:4"), optimizer=OptimizerConfig(lr=1e-3), watch=WatchConfig(wandb="x"))
    read = SavedConfig.read(saved(config))
    assert read.config() == config and not read.missing and not read.unknown and read.differences(config) == []
    assert saved(config)["config_active"] == ["slope.nm", "optimizer.lr", "watch.wandb"]


def test_a_missing_setting_had_its_default(caplog):
    content = saved(Config(slope=SlopeConfig(nm="1:2")))
    del content["config"]["slope"]["fp8"], content["config"]["optimizer"]["eps"], content["config"]["watch"]
    with caplog.at_level(logging.INFO):
        read = SavedConfig.read(content).check(WHERE, FIXED_ON_RESUME)
    assert read.differences(Config(slope=SlopeConfig(nm="1:2"))) == []
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and lines[0].startswith(f"{WHERE} is older than these settings, which count as absent: ")
    names = lines[0].partition("absent: ")[2].split(", ")
    assert names[:2] == ["slope.fp8", "optimizer.eps"]
    assert set(names[2:]) == {f"watch.{field.name}" for field in dataclasses.fields(WatchConfig)}
    changed = Config(slope=SlopeConfig(nm="1:2"), optimizer=OptimizerConfig(eps=1e-6))
    assert read.differences(changed) == ["optimizer.eps: 1e-08 then, 1e-06 now"]


def test_srste_of_before_its_mark_is_extended_srste(caplog):
    """And a version to which it is that refuses the present one, as it does any setting that it does not know."""
    exact = Config(slope=SlopeConfig(method="srste"))
    content = saved(exact)
    assert content["config_active"] == ["slope.method", "slope.exact_gradients"]
    read = SavedConfig.read(content).check(WHERE, FIXED_ON_RESUME)
    assert read.config() == exact and read.differences(exact) == [] and not read.unknown and not caplog.records
    del content["config"]["slope"]["exact_gradients"]
    with caplog.at_level(logging.INFO):
        read = SavedConfig.read(content).check(WHERE, FIXED_ON_RESUME)
    assert read.config().slope == SlopeConfig(method="extended-srste")
    assert read.differences(exact) == ["slope.method: 'extended-srste' then, 'srste' now"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{WHERE} was written when --slope-method srste meant what is extended-srste now"
    ]
    extended = Config(slope=SlopeConfig(method="extended-srste"))
    assert SavedConfig.read(saved(extended)).config() == extended


@pytest.fixture
def newer(monkeypatch):
    """A version with two more settings of the run; the default of one is not what runs did before."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NewerTrainConfig(TrainConfig):
        shuffle: str = option("blocks", "order of the samples", before="samples")
        z_loss: float = option(0.0, "weight of the z loss")

    monkeypatch.setitem(SECTIONS, "train", (NewerTrainConfig, "run", ""))
    return NewerTrainConfig


def test_a_setting_may_say_what_runs_did_before_it(newer):
    read = SavedConfig.read(saved_of_this_version())
    assert read.missing == ["train.shuffle", "train.z_loss"]
    assert read.config().train.shuffle == "samples"
    assert read.differences(Config(train=newer())) == ["train.shuffle: 'samples' then, 'blocks' now"]
    assert read.differences(Config(train=newer(shuffle="samples"))) == []


def saved_of_this_version():
    content = Config().to_dict()
    return {"config": content, "config_active": []}


def test_an_older_version_ignores_settings_without_effect(newer, monkeypatch, caplog):
    """Only the newer version can know that: it says so in the file."""
    default, as_before = saved(Config(train=newer())), saved(Config(train=newer(shuffle="samples")))
    monkeypatch.undo()
    read = SavedConfig.read(as_before).check(WHERE, FIXED_ON_RESUME)
    assert read.differences(Config()) == [] and not caplog.records
    with pytest.raises(ValueError, match=r"does not have \(train.shuffle 'blocks'\): use the version"):
        SavedConfig.read(default).check(WHERE, FIXED_ON_RESUME)
    del as_before["config_active"]
    with pytest.raises(ValueError, match=r"\(train.shuffle 'samples', train.z_loss 0.0\)"):
        SavedConfig.read(as_before).check(WHERE, FIXED_ON_RESUME)


@pytest.mark.parametrize(
    ("section", "binding", "refused"),
    [
        ("train", FIXED_ON_RESUME, True),
        ("parallel", FIXED_ON_RESUME, False),
        ("watch", FIXED_ON_RESUME, False),
        ("train", WEIGHTS, False),
        ("model", WEIGHTS, True),
        ("experts", WEIGHTS, True),
    ],
)
def test_an_unknown_setting_counts_where_its_section_counts(caplog, section, binding, refused):
    content = saved()
    content["config"].setdefault(section, {})["later"] = 3
    content["config_active"].append(f"{section}.later")
    read = SavedConfig.read(content)
    if refused:
        with pytest.raises(ValueError, match=rf"^{WHERE} was written with settings .*\({section}.later 3\)"):
            read.check(WHERE, binding)
        return
    assert read.check(WHERE, binding).config() == Config()
    assert [record.getMessage() for record in caplog.records] == [
        f"{WHERE} has settings that this version ignores: {section}.later"
    ]
