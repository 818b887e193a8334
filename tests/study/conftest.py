"""A study of two methods and two sizes, in a file."""

import copy

import pytest

from slope_megatron.config.yaml_file import write_yaml
from slope_megatron.study.rows import Rows
from slope_megatron.study.settings import read_study

VOCABULARY = 512
CONTENT = {
    "corpus": {"source": "texts", "vocab_size": VOCABULARY},
    "base": {
        "model": {"num_attention_heads": 2, "linear_bias": False, "position": "rope"},
        "data": {"seq_length": 32, "micro_batch_size": 4, "global_batch_size": 4},
        "optimizer": {"min_lr": 0.0},
    },
    "sizes": {"s": {"num_layers": 2, "hidden_size": 64}, "m": {"num_layers": 2, "hidden_size": 128}},
    "methods": {
        "dense": {"slope": {"enabled": False}},
        "static": {},
        "adapted": {"slope": {"adapter_rank": 8, "lazy_fraction": 0.25}, "like": "static", "time_as": "static"},
        "narrow": {
            "slope": {"enabled": False},
            "like": "dense",
            "narrow": {"to": "flops", "of": "static", "speedup": "whole"},
        },
    },
    "groups": {
        "sweep": {
            "sizes": ["s"],
            "methods": ["dense", "static"],
            "lr": [1e-3, 2e-3, 4e-3],
            "tokens_per_parameter": 10,
        },
        "ladder": {
            "sizes": ["s", "m"],
            "methods": ["dense", "static", "adapted", "narrow"],
            "lr": {"best_of": "sweep", "exponent": -0.5},
            "tokens_per_parameter": 10,
            "seeds": [1, 2],
        },
    },
    "speedups": {"whole": {"static": 1.2}},
}


@pytest.fixture
def study_of(tmp_path):
    """`study_of(groups=..., ...)`: the study with parts of it replaced."""

    def read(**changes):
        path = tmp_path / "study.yaml"
        write_yaml(path, {**copy.deepcopy(CONTENT), **changes})
        return read_study(path)

    return read


@pytest.fixture
def no_rows(tmp_path):
    return Rows.read(tmp_path / "rows.csv")
