"""Configuration: where values come from, what follows from them, and bad files."""

import argparse
import itertools
import re

import pytest

from slope_megatron.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    SlopeConfig,
    TrainConfig,
    add_config_arguments,
    read_config,
)


def read(*flags):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return read_config(parser.parse_args(flags))


def test_flags_win_over_files_and_later_files_over_earlier(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("slope: {nm: '1:4', adapter_rank: 8}\nmodel: {num_layers: 3}\n")
    second.write_text("slope: {nm: '1:2'}\n")
    config, origins = read(
        "--config", str(first), "--config", str(second), "--num-layers", "5", "--no-slope-init-rescale"
    )
    assert (config.slope.nm, config.slope.adapter_rank, config.model.num_layers) == ("1:2", 8, 5)
    assert origins == {
        "slope.nm": str(second),
        "slope.adapter_rank": str(first),
        "model.num_layers": "flag",
        "slope.init_rescale": "flag",
    }


def test_the_defaults_are_the_papers():
    slope = Config().slope
    assert (slope.nm, slope.pattern, slope.mode) == ("2:4", "random", "paper")
    assert (slope.backward_mask_interval, slope.lazy_fraction, slope.init_rescale) == (100, 0.01, False)


def test_the_adapters_start_at_the_floor_of_one_minus_f_times_t():
    def start(steps, fraction, rank=4):
        return Config(
            slope=SlopeConfig(adapter_rank=rank, lazy_fraction=fraction), train=TrainConfig(steps=steps)
        ).adapter_start

    assert start(1000, 0.01) == 990
    assert start(150, 0.01) == 148
    assert start(10, 1.0) == 0
    assert start(1000, 0.01, rank=0) is None
    # 0.9 * 10 is 9.000000000000002 and 0.1 * 3 is not 0.3 in binary: the floor must not slip.
    assert start(100, 0.1) == 90 and start(30, 0.9) == 3


def test_the_schedule_warms_up_and_ends_at_its_floor():
    settings = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [settings.lr_at(step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert 0.1 <= rates[-1] < 0.11
    assert settings.lr_at(20, 20) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("form", "halfway"),
    [("exponential", 0.1**0.5), ("linear", 0.55), ("cosine", 0.55), ("sqrt", 1 - 0.9 * 0.5**0.5)],
)
def test_wsd_warms_up_stays_at_the_peak_and_decays_in_its_own_form(form, halfway):
    settings = OptimizerConfig(
        lr=1.0, min_lr=0.1, warmup_steps=10, lr_schedule="wsd", decay_fraction=0.2, decay_form=form
    )
    assert settings.lr_at(4, 100) == 0.5
    assert {settings.lr_at(step, 100) for step in range(9, 81)} == {1.0}
    assert [settings.lr_at(step, 100) for step in (90, 100)] == pytest.approx([halfway, 0.1])
    assert all(settings.lr_at(step + 1, 100) < settings.lr_at(step, 100) for step in range(80, 100))


def test_blocks_may_have_patterns_of_their_own():
    slope = SlopeConfig(nm_by_block="2-3=2:8,3=1:4", dense_blocks="0")
    assert [slope.for_block(block).nm for block in range(4)] == ["2:4", "2:4", "2:8", "1:4"]
    assert [slope.for_block(block).enabled for block in range(4)] == [False, True, True, True]


@pytest.mark.parametrize(
    ("hidden", "text", "rank"),
    [(1024, "0.39%", 4), (1024, "1.56%", 16), (1024, "6.25%", 64), (768, "2.1%", 16), (64, "0.1%", 1), (64, "16", 16)],
)
def test_a_rank_may_be_a_percentage_of_the_hidden_size(hidden, text, rank):
    """The paper's ranks; a resumed run compares the rank itself."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    arguments = ["--slope-adapter-rank", text, "--hidden-size", str(hidden), "--num-attention-heads", "4"]
    config, _ = read_config(parser.parse_args(arguments))
    assert config.slope.adapter_rank == rank and config.to_dict()["slope"]["adapter_rank"] == rank


def test_a_percentage_is_no_rank_yet():
    slope = SlopeConfig(adapter_rank="1.56%")
    with pytest.raises(ValueError, match=r"--slope-adapter-rank is 1.56% of a hidden size that is not known here"):
        _ = slope.rank
    assert slope.with_rank_for(1024).rank == 16


def test_dense_has_two_names():
    assert not SlopeConfig(method="dense").enabled
    assert SlopeConfig(method="srste").enabled and not SlopeConfig(method="srste").packed
    assert not Config(slope=SlopeConfig(enabled=False)).slope.packed


def test_adapters_from_the_start():
    assert Config(slope=SlopeConfig(adapter_rank=4, lazy_fraction=1.0)).adapter_start == 0


def test_a_dense_run_may_have_widths_that_packing_could_not_cut():
    slope = SlopeConfig(enabled=False)
    assert Config(slope=slope, model=ModelConfig(hidden_size=72, num_attention_heads=4)).model.ffn == 288


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slop: {nm: '2:4'}", "unknown section 'slop': did you mean 'slope'? the sections are slope, model"),
        ("colour: {nm: '2:4'}", "unknown section 'colour'; the sections are slope, model"),
        ("steps: 5", "unknown section 'steps': it is a key of section 'train'; write it below a line `train:`"),
        ("train: {stps: 5}", "unknown key train.stps: did you mean steps?"),
        ("model: {hidden-size: 64}", "unknown key model.hidden-size: did you mean hidden_size?"),
        ("slope: {--slope-nm: '2:4'}", "unknown key slope.--slope-nm: did you mean nm?"),
        ("model: {global_batch_size: 8}", "unknown key model.global_batch_size: it belongs to section 'data'"),
        ("slope: {mn: '2:4'}", "unknown key slope.mn; the keys are enabled, nm"),
        ("slope: 3", "section 'slope' holds 3: it must map keys to values"),
        ("- 1", "holds list: it must map sections"),
        ("model: {hidden_size: wide}", "--hidden-size is 'wide': it must be of type int"),
        ("model: {gated_mlp: 1}", "--gated-mlp is 1: it must be of type bool"),
    ],
)
def test_bad_files_get_one_clear_sentence(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read("--config", str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        read("--config", str(tmp_path / "nowhere.yaml"))


def test_every_field_is_a_flag_with_a_manual_line():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    manual = parser.format_help()
    for flag in (
        "--slope-nm",
        "--no-slope",
        "--slope-lazy-fraction",
        "--hidden-size",
        "--tensor-parallel",
        "--lr",
        "--out",
    ):
        assert flag in manual
    described = [action for action in parser._actions if action.option_strings and action.help]
    assert len(described) == len([action for action in parser._actions if action.option_strings])


@pytest.mark.parametrize(
    ("slope", "sparse", "switches"),
    [
        ({}, range(12), []),
        ({"dense_start": 0.25, "dense_tail": 0.25}, range(3, 9), [3, 9]),
        ({"method": "srste", "dense_tail": 0.1}, range(10), [10]),
        # FST's published tail, where no other is asked for.
        ({"method": "fst"}, range(10), [10]),
        ({"method": "fst", "fst_dense_tail": 0.375}, range(7), [7]),
        ({"method": "fst", "dense_tail": 0.5}, range(6), [6]),
        ({"method": "fst", "dense_tail": 0.25, "fst_dense_tail": 0.5}, range(9), [9]),
        ({"method": "srste", "fst_dense_tail": 0.5}, range(12), []),
        ({"method": "fst", "dense_tail": 0.0}, range(12), []),
        ({"enabled": False, "dense_tail": 0.5}, range(6), []),
        # Of a dense run no step has to be sparse.
        ({"enabled": False, "dense_start": 0.5, "dense_tail": 0.5}, range(6, 6), []),
        ({"method": "dense", "dense_start": 0.5, "dense_tail": 0.5}, range(6, 6), []),
    ],
)
def test_sparse_steps_lie_between_the_dense_ones(slope, sparse, switches):
    config = Config(slope=SlopeConfig(**slope), train=TrainConfig(steps=12))
    assert config.slope.sparse_steps(12) == sparse and config.switches == switches
    forms = [config.form_at(step).slope.enabled for step in range(12)]
    assert forms == [config.slope.enabled and step in sparse for step in range(12)]
