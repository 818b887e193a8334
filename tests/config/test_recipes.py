"""Recipes say what was published, and `--scale` makes them small by its rules."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from slope_megatron.config import add_config_arguments, read_config
from slope_megatron.config.yaml_file import read_yaml, write_yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
MODELS = {
    "bert-large-phase1": "bert-large-uncased",
    "bert-large-phase2": "bert-large-uncased",
    "gpt2-small-openwebtext": "gpt2-small",
    "gpt2-large-openwebtext": "gpt2-large",
}


def config_of(path, *flags):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return read_config(parser.parse_args(["--config", str(path), *flags]))[0]


def test_every_family_has_a_recipe():
    assert {path.stem for path in RECIPES} >= {*MODELS, "opt-2.6b", "opt-66b", "llama-3-8b", "mistral-7b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_is_of_its_model(path):
    config = config_of(path)
    model = ROOT / "launch" / "models" / f"{MODELS.get(path.stem, path.stem)}.yaml"
    expected = read_yaml(model)["model"]
    found = dataclasses.asdict(config.model)
    assert {key: found[key] for key in expected} == expected
    # Its batch can be cut for one to eight nodes of four GPUs.
    for replicas in (1, 4, 32):
        config.data.micro_batches(replicas)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_names_its_source(path):
    lines = path.read_text().split("\ndata:\n")[1].splitlines()
    values = [line for line in lines if line.startswith("  ")]
    assert len(values) > 15
    for line in values:
        comment = line.partition("#")[2]
        assert re.search(r"\[(S|B|L|O|L2|L3|ours)\]|the same|phase 1|last 100", comment), line


def test_berts_published_schedule():
    """7,038 + 1,563 steps, poly of degree 0.5, warm-up over 28.43 and 12.8 %."""
    one, two = (config_of(ROOT / "launch" / "recipes" / f"bert-large-phase{phase}.yaml") for phase in (1, 2))
    assert (one.train.steps, one.data.global_batch_size, one.data.seq_length) == (7038, 65536, 128)
    assert (two.train.steps, two.data.global_batch_size, two.data.seq_length) == (1563, 32768, 512)
    assert one.optimizer.lr_at(2000, 7038) == pytest.approx(6e-3, rel=1e-3)
    assert two.adapter_start == 1462
    shared = ("nm", "pattern", "sparse_attention", "sparse_mlp", "dense_first_linear")
    assert all(getattr(one.slope, name) == getattr(two.slope, name) for name in shared)
    assert one.model == two.model, "phase 2 takes phase 1's weights"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", ["1.0", "0.1", "0.01", "0.0001"])
def test_scaled_recipes_are_whole(path, scale):
    full, small = config_of(path), config_of(path, "--scale", scale)
    share = float(scale)
    assert small.train.steps == max(20, round(full.train.steps * share))
    assert small.data.global_batch_size <= max(8, full.data.global_batch_size * share)
    for replicas in (1, 2, 4):
        assert small.data.global_batch_size % replicas == 0
    full_head, head = (each.model.hidden_size // each.model.num_attention_heads for each in (full, small))
    assert head == full_head
    assert small.model.vocab_size is None
    if share == 1:
        assert small.model == dataclasses.replace(full.model, vocab_size=None)
        assert (small.optimizer, small.train, small.data, small.slope) == (
            *(full.optimizer, full.train, full.data),
            full.slope,
        )
    else:
        assert small.model.hidden_size < full.model.hidden_size or full.model.num_attention_heads == 2
        assert small.model.num_layers < full.model.num_layers


def test_scaled_phases_still_fit_each_other():
    one, two = (
        config_of(ROOT / "launch" / "recipes" / f"bert-large-phase{phase}.yaml", "--scale", "0.003") for phase in (1, 2)
    )
    assert one.model == two.model


def write(tmp_path, **sections):
    write_yaml(tmp_path / "recipe.yaml", sections)
    return tmp_path / "recipe.yaml"


RECIPE = {
    "model": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 4096},
    "data": {"seq_length": 512, "global_batch_size": 1024, "micro_batch_size": 16},
    "optimizer": {"lr": 1.0e-3, "min_lr": 1.0e-4, "warmup_steps": 200},
    "train": {"steps": 1000, "save_interval": 100},
    "slope": {"adapter_rank": 16},
}


def test_the_rules(tmp_path, caplog):
    path = write(tmp_path, **RECIPE)
    with caplog.at_level("INFO", "slope_megatron"):
        small = config_of(path, "--scale", "0.0625", "--num-layers", "3")
    assert (small.train.steps, small.data.global_batch_size, small.data.seq_length) == (62, 64, 128)
    assert (small.model.hidden_size, small.model.num_attention_heads, small.model.ffn) == (256, 4, 1024)
    assert small.model.num_layers == 3, "a flag wins over the rule's 6"
    assert (small.optimizer.warmup_steps, small.train.save_interval, small.slope.adapter_rank) == (12, 6, 4)
    # sqrt(64 / 1024) x 1024 / 256
    assert (small.optimizer.lr, small.optimizer.min_lr) == (1e-3, 1e-4)
    for said in ("train.steps 1000 -> 62", "model.num_layers 24 -> 6", "model.hidden_size 1024 -> 256"):
        assert said in caplog.text


@pytest.mark.parametrize("scale", ["0", "-1", "1.5", "nan"])
def test_other_scales_are_refused(tmp_path, scale):
    with pytest.raises(ValueError, match=r"--scale is .*: it must be in \(0, 1\]"):
        config_of(write(tmp_path, **RECIPE), "--scale", scale)
