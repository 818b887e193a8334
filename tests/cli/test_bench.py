"""`slope bench`: its arguments, and what a machine without 2:4 units is told."""

import argparse

import pytest
import torch

from slope_megatron import cli
from slope_megatron.cli import bench


def parse(*words):
    return cli.parse(["bench", *words])


@pytest.mark.parametrize("name", ["gemm", "block", "parallel", "step", "refresh", "fp8"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can be measured")
def test_a_machine_without_a_gpu_is_refused_with_the_reason(name):
    arguments = parse(name)
    with pytest.raises(ValueError, match=r"slope bench measures .* this machine cannot: no CUDA device"):
        arguments.run(arguments)


def test_the_published_models_are_offered():
    parser = argparse.ArgumentParser()
    bench.load("block").add_arguments(parser)
    assert set(parser.parse_args([]).models) >= {"opt-2.6b", "opt-66b", "llama-3-8b", "mistral-7b"}


def test_a_benchmark_has_a_manual_of_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "gemm", "--help"])
    assert end.value.code == 0
    assert "usage: slope bench gemm" in capsys.readouterr().out


def test_without_a_checkout_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "none")
    with pytest.raises(ValueError, match="needs a source checkout"):
        parse("gemm").run(argparse.Namespace(benchmark="gemm", rest=[]))
