"""The flags in a Megatron-style script, and the start-up table."""

import argparse
import dataclasses

import pytest

from slope_megatron.config import SlopeConfig, add_config_arguments, read_config
from slope_megatron.integrations.megatron_lm.args import add_slope_arguments, slope_config_from_args, value_table


def parse(*flags):
    """As Megatron does it: its own parser, then the provider."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    return add_slope_arguments(parser).parse_args([*map(str, flags)])


def test_without_the_flag_the_model_is_dense():
    assert slope_config_from_args(parse("--num-layers", 2)) == SlopeConfig(enabled=False)


def test_the_flags_are_the_dataclass(tmp_path):
    flags = ["--slope", "--slope-nm", "1:4", "--slope-adapter-rank", 8, "--slope-lazy-fraction", 0.1]
    found = slope_config_from_args(parse(*flags, "--slope-backend", "reference", "--no-slope-sparse-attention"))
    assert found == SlopeConfig(
        nm="1:4", adapter_rank=8, lazy_fraction=0.1, backend="reference", sparse_attention=False
    )


def test_every_field_has_a_flag():
    parser = add_slope_arguments(argparse.ArgumentParser())
    destinations = {action.dest for action in parser._actions}
    assert {f"SlopeConfig.{field.name}" for field in dataclasses.fields(SlopeConfig)} <= destinations


def test_a_file_and_flags_over_it(tmp_path):
    path = tmp_path / "sparse.yaml"
    path.write_text("slope: {nm: '1:2', adapter_rank: 4}\n")
    found = slope_config_from_args(parse("--slope-config", path, "--slope-adapter-rank", 16))
    assert found == SlopeConfig(nm="1:2", adapter_rank=16)
    assert not slope_config_from_args(parse("--slope-config", path, "--no-slope")).enabled


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slope-nm", "2:4"], "--slope-nm without --slope: the model would be dense"),
        (["--slope", "--slope-nm", "4:4"], "--slope-nm is '4:4'"),
        (["--slope-config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message):
    with pytest.raises(ValueError) as error:
        slope_config_from_args(parse(*flags))
    assert message in str(error.value)


def test_the_table_says_where_every_value_came_from(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 3}\n")
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    config, origins = read_config(parser.parse_args(["--config", str(path), "--slope-nm", "1:2", "--lr", "0.001"]))
    lines = value_table(config, origins).splitlines()
    words = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    assert words["--num-layers"] == ["3", str(path)]
    assert words["--slope-nm"] == ["1:2", "flag"] and words["--lr"] == ["0.001", "flag"]
    assert words["--slope"] == ["True", "default"] and words["--seed"] == ["1234", "default"]
    assert len(words) == sum(len(values) for values in config.to_dict().values())
