"""`slope bench`: its arguments, and what a machine without 2:4 units is told."""

import argparse

import pytest
import torch

from slope_megatron import cli
from slope_megatron.cli import bench


def parse(*words):
    return cli.parse(["bench", *words])


@pytest.mark.parametrize("name", bench.BENCHMARKS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can be measured")
def test_a_machine_without_a_gpu_is_refused_with_the_reason(name):
    arguments = parse(name)
    with pytest.raises(ValueError, match=r"slope bench measures .* this machine cannot: no CUDA device"):
        arguments.run(arguments)


def test_the_published_models_are_offered():
    parser = argparse.ArgumentParser()
    bench.load("block").add_arguments(parser)
    assert set(parser.parse_args([]).models) >= {"opt-2.6b", "opt-66b", "llama-3-8b", "mistral-7b"}


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_a_benchmark_has_a_manual_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", name, "--help"])
    assert end.value.code == 0
    assert f"usage: slope bench {name}" in capsys.readouterr().out


def test_adapters_work_is_counted_by_the_formula():
    """One linear of 64 x 32 with rank 4 and 8 tokens: three pairs of products in training, one in forward."""
    from slope_megatron.bench import adapters
    from slope_megatron.bench.models import Model
    from slope_megatron.config import ModelConfig

    one = type("One", (Model,), {"linears": lambda self: {"fc": (64, 32)}})(
        "one", ModelConfig(hidden_size=32, num_attention_heads=1)
    )
    assert adapters.adapter_work(one, 4, 8, train=False) == (2 * 8 * 4 * (64 + 32), 2 * 8 * (64 + 32))
    assert adapters.adapter_work(one, 4, 8, train=True) == (3 * 2 * 8 * 4 * (64 + 32), 3 * 2 * 8 * (64 + 32))
    assert adapters.rank_of(one, 6.25) == 2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("sparse", "rank"), [(False, 0), (True, 0), (True, 4)])
def test_decoders_are_built_from_random_tensors(gated, sparse, rank):
    from slope_megatron.inference.decoder import Decoder

    benchmark = bench.load("decode")
    shape = {"hidden_size": 64, "num_attention_heads": 4}
    if gated:
        shape |= {"gated_mlp": True, "activation": "silu", "num_query_groups": 2, "position": "rope"}
        shape |= {"normalization": "RMSNorm", "linear_bias": False}
    model = benchmark.Model("m", benchmark.ModelConfig(**shape))
    config = benchmark.architecture(model, 2, positions=16)
    decoder = Decoder(config, benchmark.random_tensors(model, config, sparse, rank, "cpu"))
    assert decoder(torch.randint(benchmark.VOCABULARY, (3, 5))).isfinite().all()
    assert (decoder.linear_bytes()["packed"] > 0) == sparse


def test_what_decoding_can_gain_by_bytes():
    benchmark = bench.load("decode")
    model = benchmark.Model("m", benchmark.ModelConfig(hidden_size=64, num_attention_heads=4))
    assert benchmark.byte_bound(model, 0) == pytest.approx(16 / 9)
    # 12 x 64^2 weights; factors of rank 4: qkv 4 x 4 x 64, proj 2, fc1 and fc2 5 each.
    assert benchmark.byte_bound(model, 4) == pytest.approx(12 * 64 / (12 * 64 * 9 / 16 + 4 * 16))


def test_adapters_are_compared_with_the_block_without_them():
    benchmark = bench.load("block")
    with pytest.raises(ValueError, match="--adapters with --modes full: they are compared with paper"):
        benchmark.check_modes(["full"], [1.56])
