"""Every argument of Megatron-LM's parser is in the table: it works, has no effect on linears, or is refused."""

import argparse
import collections
import json
import os
from pathlib import Path

import pytest

from helpers.upstream_facts import ARGUMENTS, facts_of, version_of
from slope_megatron.integrations.megatron_lm.arguments import BESIDE, NO_EFFECT, WORKS, names, unknown
from slope_megatron.integrations.megatron_lm.refused import RULES, refusals

CHECKOUTS = [
    path.parent for path in Path(os.environ.get("SLOPE_UPSTREAM_CHECKOUTS", "/nowhere")).glob("*/gpt_builders.py")
]
REFUSED = [rule.name for rule in RULES]
TABLE = [*names(WORKS, NO_EFFECT, BESIDE), *REFUSED]
COMMITTED = {
    name: versions for versions, text in json.loads(ARGUMENTS.read_text(encoding="utf-8")) for name in text.split()
}
# Megatron adds them where that package is installed.
KITCHEN = {"kitchen_config_file", "kitchen_recipe_number"}


def test_every_argument_of_the_versions_that_patches_serve_is_in_the_table_once():
    assert {version for versions in COMMITTED.values() for version in versions} >= {"0.16.1", "0.17.1", "0.18.2"}
    assert set(COMMITTED) - set(TABLE) - {"help"} == set(), "new: say what it is to a model with --slope"
    assert set(TABLE) - set(COMMITTED) == KITCHEN | {"help"}, "no version has it any more"
    assert [name for name, times in collections.Counter(TABLE).items() if times > 1] == []


@pytest.mark.skipif(not CHECKOUTS, reason="no checkouts of Megatron-LM in $SLOPE_UPSTREAM_CHECKOUTS")
def test_every_argument_of_the_checkouts_at_hand_is_in_the_table():
    for checkout in CHECKOUTS:
        found = set(facts_of(checkout))
        assert found - set(TABLE) == set(), f"{checkout} has new ones: say what they are to a model with --slope"
        committed = {name for name, versions in COMMITTED.items() if version_of(checkout) in versions}
        assert committed in (found, set()), f"{ARGUMENTS.name} is of another {version_of(checkout)}"


def test_what_is_read_beside_a_refused_argument_is_looked_at_when_that_is_served():
    assert set(BESIDE) - set(REFUSED) == set()


# One refused value each; True for the others.
VALUES = {
    "transformer_impl": "inference_optimized",
    "expert_tensor_parallel_num_weight_shards": 2,
    "softmax_type": "learnable",
    "window_size": (128, 0),
    "flash_attention_version": 3,
    "fp8": "hybrid",
    "fp4": "e2m1",
    "kitchen_config_file": "recipe.yaml",
    "kitchen_recipe_number": 0,
    "te_precision_config_file": "precision.yaml",
    "context_parallel_size": 2,
    "tensor_parallel_num_weight_shards": 2,
    "ckpt_format": "torch_dcp",
    "num_experts": 8,
    "mtp_num_layers": 1,
    "experimental_attention_variant": "dsa",
    "optimizer": "muon",
    "cuda_graph_impl": "local",
    "cpu_offloading_num_layers": 1,
    "hybrid_attention_ratio": 0.5,
    "hybrid_mlp_ratio": 0.5,
}
# What the upstream's parsers have where nothing was given, of arguments whose default is no plain `no`.
DEFAULTS = {
    "transformer_impl": "local",
    "softmax_type": "vanilla",
    "context_parallel_size": 1,
    "ckpt_format": "torch_dist",
    "optimizer": "adam",
    "cuda_graph_impl": "none",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_argument_its_value_and_the_way_out(name):
    value = VALUES.get(name, True)
    args = argparse.Namespace(**{"transformer_impl": "local", name: value})
    (text,) = refusals(args)
    said, instead = text.split(": use ")
    assert said == f"{name} is {value!r} with --slope" and len(instead) > 15 and len(text) < 240


def test_nothing_is_refused_where_nothing_was_given():
    plain = argparse.Namespace(**{**dict.fromkeys(TABLE), **DEFAULTS})
    assert refusals(plain) == [] and refusals(argparse.Namespace()) == []
    numbers = {"kitchen_recipe_number"}
    switches = set(REFUSED) - set(DEFAULTS) - numbers
    assert refusals(argparse.Namespace(**dict.fromkeys(switches, False))) == []


def test_options_of_the_local_attention_are_transformer_engines_to_serve():
    args = {"window_size": (128, 0), "layernorm_zero_centered_gamma": True}
    assert len(refusals(argparse.Namespace(transformer_impl="local", **args))) == 2
    assert len(refusals(argparse.Namespace(transformer_impl="transformer_engine", **args))) == 0


@pytest.mark.parametrize("optimizer", ["muon", "dist_muon", "adaptive_muon", "soap"])
def test_optimizers_of_matrices_are_refused(optimizer):
    assert refusals(argparse.Namespace(optimizer=optimizer))
    assert not any(refusals(argparse.Namespace(optimizer=plain)) for plain in ("adam", "sgd", "lion"))


def test_an_argument_of_a_newer_upstream_is_found():
    parser = argparse.ArgumentParser()
    for flag in ("--lr", "--fp8-format", "--brand-new"):
        parser.add_argument(flag, dest={"--fp8-format": "fp8"}.get(flag))
    assert unknown(parser) == ["brand_new"]
