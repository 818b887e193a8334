"""Operations of a token against counts by hand, and against the products of a model that runs."""

import dataclasses

import pytest
import torch

from helpers.models import VOCABULARY, build_engine, small_config, step_batches
from slope_megatron.config import WatchConfig


def test_a_block_by_hand():
    """Width 64, FFN 256, 2 blocks, sequence 16, 2:4; block 0's QKV is dense."""
    from slope_megatron.training.telemetry.flops import flops_per_token

    qkv, proj, mlp = 3 * 64 * 64, 64 * 64, 2 * 64 * 256
    attention, output = 2 * 16 * 64, 96 * 64  # multiply-adds a token: scores and values; the padded vocabulary
    whole = 2 * (qkv + proj + mlp + attention) + output
    counts = flops_per_token(small_config(), VOCABULARY)
    assert counts.dense_equivalent == 3 * 2 * whole
    sparse = 2 * (qkv + proj + mlp) - qkv
    # Forward and dgrad do half of a sparse product; wgrad all of it.
    assert counts.actual == 3 * 2 * whole - 2 * sparse
    dense = flops_per_token(small_config(slope={"enabled": False}), VOCABULARY)
    assert dense.actual == dense.dense_equivalent == counts.dense_equivalent
    full = flops_per_token(small_config(slope={"mode": "full"}), VOCABULARY)
    assert full.actual == 3 * 2 * whole - 3 * sparse
    masked = flops_per_token(small_config(slope={"method": "srste"}), VOCABULARY)
    assert masked.actual == masked.dense_equivalent
    eighth = flops_per_token(small_config(slope={"nm": "2:8"}), VOCABULARY)
    assert eighth.actual == 3 * 2 * whole - 2 * 2 * 0.75 * sparse
    with_adapters = flops_per_token(small_config(slope={"adapter_rank": 4}), VOCABULARY, adapters=True)
    shapes = [(64, 64), (256, 64), (64, 256)]
    pairs = 2 * sum(4 * (a + b) for a, b in shapes) + 4 * (192 + 64)
    assert with_adapters.actual == counts.actual + 3 * 2 * pairs


def counted(config):
    """Operations that torch counts in one training step, a token."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    engine = build_engine(config, torch.float32)
    batches = step_batches(config, 0, 0, 1)
    # Attention as plain products: torch does not count its fused form on CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine.forward_backward_reduce(batches)
    return counter.get_total_flops() / batches[0]["tokens"].numel() / len(batches)


@pytest.mark.parametrize("gated", [False, True], ids=["opt", "llama"])
def test_a_dense_model_does_what_is_counted(ranks, gated):
    from slope_megatron.training.telemetry.flops import flops_per_token

    config = small_config(gated=gated, slope={"enabled": False})
    [found] = ranks.run(counted, config, world=1)
    assert found == flops_per_token(config, VOCABULARY).dense_equivalent


def test_mfu_is_left_out_where_the_peak_is_unknown():
    from slope_megatron.training.telemetry import flops

    counts = flops.Flops(dense_equivalent=3e9, actual=2e9)
    assert flops.speed(counts, 1e6, 8, None) == {"model_tflops": 375.0, "actual_tflops": 250.0}
    known = flops.speed(counts, 1e6, 8, 1000.0)
    assert known["mfu"] == 0.375 and known["mfu_actual"] == 0.25
    given = dataclasses.replace(small_config(), watch=WatchConfig(peak_tflops=77.0))
    assert flops.peak_tflops(given) == 77.0
    if not torch.cuda.is_available():
        assert flops.peak_tflops(small_config()) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA RTX 4090", None),
    ],
)
def test_known_gpus(monkeypatch, name, peak):
    from slope_megatron.training.telemetry import flops

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert flops.peak_tflops(small_config()) == peak
