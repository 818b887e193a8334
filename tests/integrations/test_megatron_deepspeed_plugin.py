"""The plugin for Megatron-DeepSpeed, on linears of the installed megatron-core, whose constructors speak alike."""

import argparse
import importlib.util
import sys
import types

import pytest

from slope_megatron.config import SlopeConfig
from slope_megatron.integrations.megatron_deepspeed import plugin as plugin

WIDTH, FFN = 32, 64


def packed_layer(block=1):
    """A layer's four linears, gated, packed by the plugin, in float64."""
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=WIDTH,
        num_attention_heads=4,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    common = {"config": config, "init_method": config.init_method, "bias": True, "skip_bias_add": True}

    def column(inputs, outputs):
        return ColumnParallelLinear(inputs, outputs, gather_output=False, **common)

    def row(inputs, outputs):
        return RowParallelLinear(inputs, outputs, input_is_parallel=True, **common)

    layer = types.SimpleNamespace(
        self_attention=types.SimpleNamespace(query_key_value=column(WIDTH, 3 * WIDTH), dense=row(WIDTH, WIDTH)),
        mlp=types.SimpleNamespace(dense_h_to_4h=column(WIDTH, 2 * FFN), dense_4h_to_h=row(FFN, WIDTH)),
    )
    args = types.SimpleNamespace(seed=5, init_method_std=0.02, num_layers=2)
    plugin.pack_layer(layer, block, SlopeConfig(backend="reference"), args)
    return {
        name: getattr(getattr(layer, holder), attribute).double()
        for name, (holder, attribute) in plugin.ATTRIBUTES.items()
    }


def mlp_step():
    """Weights of the MLP, its output, dX and the packed gradients, on this rank."""
    import torch

    linears = packed_layer()
    fc1, fc2 = linears["linear_fc1"], linears["linear_fc2"]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 2, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden, bias = fc1(x)
    gate, up = (hidden + bias).chunk(2, -1)
    y, _ = fc2(torch.nn.functional.silu(gate) * up)
    (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum().backward()
    dense = {name: linear.dense_weight() for name, linear in linears.items()}
    return dense, y.detach(), x.detach(), x.grad, fc1.weight.grad, fc2.weight.grad


def whole(parts, name):
    """A weight from its shards; gate and up of each shard lie above each other."""
    import torch

    if name == "linear_fc1":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts, 0 if name == "linear_qkv" else 1)


def test_values_and_products_are_the_same_at_every_tensor_parallel_size(ranks):
    import torch

    (one,) = ranks.run(mlp_step, world=1)
    two = ranks.run(mlp_step, world=2, tensor_parallel=2)
    for name in plugin.ATTRIBUTES:
        assert torch.equal(one[0][name], whole([found[0][name] for found in two], name)), name
    for found in two:
        torch.testing.assert_close(found[1], one[1], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found[3], one[3], rtol=1e-12, atol=1e-15)
    assert one[3].abs().sum() > 0
    fc1_gradient = whole([found[4] for found in two], "linear_fc1")
    torch.testing.assert_close(fc1_gradient, one[4], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.cat([found[5] for found in two], 1), one[5], rtol=1e-12, atol=1e-15)


def test_the_product_is_that_of_the_2_of_4_weights(ranks):
    import torch

    ((dense, y, x, *_),) = ranks.run(mlp_step, world=1)
    for weight in dense.values():
        assert torch.all((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2)
    gate, up = (x @ dense["linear_fc1"].t()).chunk(2, -1)
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up @ dense["linear_fc2"].t(), rtol=1e-12, atol=0)


def names_that_are_packed(block):
    from slope_megatron.layers.packed_weight import PackedWeight

    return sorted(name for name, linear in packed_layer(block).items() if isinstance(linear, PackedWeight))


def test_the_first_linear_stays_dense(ranks):
    assert ranks.run(names_that_are_packed, 0, world=1) == [["linear_fc1", "linear_fc2", "linear_proj"]]


def settings_of(monkeypatch, *flags, **values):
    """`settings()` with a Megatron that has parsed these flags."""
    parser = plugin.add_slope_arguments(argparse.ArgumentParser())
    args = argparse.Namespace(**{"deepspeed": True, "zero_stage": 1, "num_experts": [1], **values})
    module = types.ModuleType("megatron")
    module.get_args = lambda: parser.parse_args([*flags], namespace=args)
    monkeypatch.setitem(sys.modules, "megatron", module)
    return plugin.settings()[1]


def test_what_it_can_serve_is_taken(monkeypatch):
    assert settings_of(monkeypatch, "--slope", zero_stage=2).enabled
    assert not settings_of(monkeypatch, zero_stage=3, mos=True).enabled, "without --slope nothing is refused"


@pytest.mark.parametrize(
    ("flags", "values", "message"),
    [
        ([], {"zero_stage": 3}, "zero_stage is 3 with --slope: use --zero-stage 1 or 2"),
        ([], {"num_experts": [1, 8]}, "num_experts is [1, 8] with --slope: use a model without experts"),
        ([], {"universal_checkpoint": True}, "universal_checkpoint is True with --slope: use this run's own"),
        ([], {"fp8_hybrid": True}, "fp8_hybrid is True with --slope: use --slope-fp8"),
        ([], {"init_method_xavier_uniform": True}, "init_method_xavier_uniform is True with --slope: use --init"),
        ([], {"deepspeed": False}, "--deepspeed is off with --slope"),
        ([], {"kd": True}, "no --kd"),
        (
            [],
            {"deepspeed_config_dict": {"optimizer": {"type": "Muon"}}},
            "the DeepSpeed configuration's optimizer is Muon with --slope: use adam",
        ),
        (
            [],
            {"deepspeed_config_dict": {"checkpoint": {"load_universal": True}}},
            "the DeepSpeed configuration's load_universal is on with --slope: use this run's own checkpoints",
        ),
        (["--slope-adapter-rank", "4"], {}, "--slope-adapter-rank is 4"),
        (["--slope-pattern", "wanda"], {}, "--slope-pattern is wanda"),
        (["--slope-mode", "full"], {}, "--slope-mode full"),
        (["--slope-method", "rigl"], {}, "--slope-method rigl"),
        (["--slope-mup"], {}, "--slope-mup is on: the upstream's optimizer has one learning rate"),
        (["--slope-dense-start", "0.5"], {}, "--slope-dense-start is 0.5: the model has one form"),
        (["--slope-dense-tail", "0.25"], {}, "--slope-dense-tail is 0.25: the model has one form"),
        (["--slope-lr-multiplier", "2"], {}, "--slope-lr-multiplier is 2.0: the upstream's optimizer has one"),
    ],
)
def test_what_it_cannot_serve_is_refused(monkeypatch, flags, values, message):
    with pytest.raises(ValueError) as error:
        settings_of(monkeypatch, "--slope", *flags, **values)
    assert message in str(error.value)


def test_the_flags_join_those_of_the_script():
    def pretrain(model, extra_args_provider=None):
        return extra_args_provider(argparse.ArgumentParser()).parse_args(["--own", "3", "--slope"])

    def own(parser):
        parser.add_argument("--own", type=int)
        return parser

    args = plugin.with_flags(pretrain)("model", extra_args_provider=own)
    assert args.own == 3 and vars(args)["SlopeConfig.enabled"]
    with pytest.raises(SystemExit):
        plugin.with_flags(pretrain)("model")


def test_a_deepspeed_without_compression_gets_a_stand_in_that_refuses(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, plugin.COMPRESSION, None)
    plugin.complete_deepspeed()
    with pytest.raises(ValueError, match="leave compression_training out"):
        sys.modules[plugin.COMPRESSION].init_compression("model", {})
