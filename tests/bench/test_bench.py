"""`slope bench`: its arguments, and what a machine without 2:4 units is told."""

import argparse

import pytest
import torch

from slope_megatron import cli
from slope_megatron.cli import bench


def parse(*words):
    return cli.parse(["bench", *words])


@pytest.mark.parametrize("name", [name for name in bench.BENCHMARKS if name != "fill"])
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


@pytest.mark.parametrize("share", [0.0, 6.25])
def test_whole_models_are_counted_as_the_planner_counts_them(share):
    """A block at the formula's bytes a weight, extrapolated, is the planner's state to the byte."""
    from slope_megatron.config import Config, ModelConfig, SlopeConfig, shipped
    from slope_megatron.config.fields import load_yaml
    from slope_megatron.models import counts as counting
    from slope_megatron.planner import memory

    benchmark = bench.load("memory")
    from slope_megatron.bench.holdings import Ledger
    from slope_megatron.bench.models import MODELS

    model = MODELS["llama-3-8b"]
    weights = sum(rows * columns for rows, columns in model.linears().values())
    ledger = Ledger()
    # Values, both operands, both patterns, fp32 gradients and AdamW's state of half the weights.
    ledger.charge("all", (1 + 2 * 9 / 8 + 1 / 8 + 1 / 16 + 2 + 6) * weights, 0)
    ledger.charge("adapters' gradients", 123, 123)
    found = benchmark.whole_model(model, benchmark.Form(True, share), ledger, "training")

    path = shipped.folder("models") / "llama-3-8b.yaml"
    architecture = ModelConfig(**load_yaml(path, {"model": ModelConfig})["model"])
    config = Config(model=architecture, slope=SlopeConfig(adapter_rank=256 if share else 0))
    counts = counting.count(counting.model_tensors(config, architecture.vocab_size), 1)
    expected = memory.state_bytes(counts, memory.precision("bf16", "fp32"), "kernels")
    assert found == pytest.approx(sum(expected.values()), rel=1e-12)


def test_adapters_work_is_counted_by_the_formula():
    """One linear of 64 x 32 with rank 4 and 8 tokens: three pairs of products in training, one in forward."""
    benchmark = bench.load("adapters")
    from slope_megatron.bench.models import Model

    one = type("One", (Model,), {"linears": lambda self: {"fc": (64, 32)}})("one", 32, 64, 1, 1, False)
    assert benchmark.adapter_work(one, 4, 8, train=False) == (2 * 8 * 4 * (64 + 32), 2 * 8 * (64 + 32))
    assert benchmark.adapter_work(one, 4, 8, train=True) == (3 * 2 * 8 * 4 * (64 + 32), 3 * 2 * 8 * (64 + 32))
    assert benchmark.rank_of(one, 6.25) == 2


def test_a_ledger_adds_up_what_it_is_charged_with():
    bench.load("memory")
    from slope_megatron.bench.holdings import Ledger

    ledger = Ledger()
    ledger.charge("values", 512, 500)
    ledger.charge("values", 1024, 1000)
    assert ledger.items == {"values": (1536, 1500)} and ledger.total == 1536


def test_filling_is_measured_on_any_device(tmp_path, capsys):
    arguments = parse("fill", "--models", "tiny", "--device", "cpu", "--tensor-parallel", "2", "--out", str(tmp_path))
    assert arguments.run(arguments) == 0
    note, header, *lines = (tmp_path / "fill.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    assert note.startswith("# on cpu, ") and [row["linear"] for row in rows] == ["qkv", "proj", "fc1", "fc2"]
    assert [(row["rows"], row["columns"]) for row in rows] == [("96", "64"), ("64", "32"), ("128", "64"), ("64", "128")]
    assert all(float(row["fill_s"]) > 0 and float(row["second_pruning_s"]) > 0 for row in rows)
    assert "a block of tiny at TP 2: " in capsys.readouterr().out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("sparse", "rank"), [(False, 0), (True, 0), (True, 4)])
def test_decoders_are_built_from_random_tensors(gated, sparse, rank):
    from slope_megatron.inference.decoder import Decoder

    benchmark = bench.load("decode")
    model = benchmark.Model("m", 64, 128, 4, 2 if gated else 4, gated)
    config = benchmark.architecture(model, 2, positions=16)
    decoder = Decoder(config, benchmark.random_tensors(model, config, sparse, rank, "cpu"))
    assert decoder(torch.randint(benchmark.VOCABULARY, (3, 5))).isfinite().all()
    assert (decoder.linear_bytes()["packed"] > 0) == sparse


def test_what_decoding_can_gain_by_bytes():
    benchmark = bench.load("decode")
    model = benchmark.Model("m", 64, 256, 4, 4, False)
    assert benchmark.byte_bound(model, 0) == pytest.approx(16 / 9)
    # 12 x 64^2 weights; factors of rank 4: qkv 4 x 4 x 64, proj 2, fc1 and fc2 5 each.
    assert benchmark.byte_bound(model, 4) == pytest.approx(12 * 64 / (12 * 64 * 9 / 16 + 4 * 16))
