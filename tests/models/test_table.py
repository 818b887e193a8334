"""The start-up table of what is sparse."""

from slope_megatron.config import Config, ModelConfig, SlopeConfig
from slope_megatron.models.rules import sparsity_table


def table(layers=6, **slope):
    return sparsity_table(Config(slope=SlopeConfig(**slope), model=ModelConfig(num_layers=layers)))


def test_the_default_table():
    assert table().splitlines() == [
        "blocks          qkv   proj    fc1    fc2",
        "0             dense    2:4    2:4    2:4",
        "1-5             2:4    2:4    2:4    2:4",
        "embeddings, output layer: dense",
    ]


def test_halves_with_patterns_of_their_own_and_a_dense_block():
    assert table(nm_by_block="3-5=2:8", dense_blocks="5", sparse_attention=False).splitlines()[1:-1] == [
        "0-2           dense  dense    2:4    2:4",
        "3-4           dense  dense    2:8    2:8",
        "5             dense  dense  dense  dense",
    ]
