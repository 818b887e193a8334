"""Transformer Engine's own block as a peer, with a layer of the same signature in its place; it needs no GPU."""

import contextlib
import sys
import types

import pytest
import torch

from slope_megatron.bench import bench_peers, te_block
from slope_megatron.bench.models import MODELS, TINY


class Layer(torch.nn.Module):
    """Takes what Transformer Engine's takes, and doubles its input."""

    def __init__(
        self,
        hidden_size,
        ffn_hidden_size,
        num_attention_heads,
        *,
        num_gqa_groups,
        hidden_dropout,
        attention_dropout,
        self_attn_mask_type,
        attn_input_format,
        fuse_qkv_params,
        params_dtype,
        bias,
        activation,
        normalization,
        device,
    ):
        super().__init__()
        self.seen, self.first = (hidden_size, num_gqa_groups, bias, activation, normalization), []

    def forward(self, hidden_states, *, is_first_microbatch, rotary_pos_emb):
        self.first.append((is_first_microbatch, rotary_pos_emb is not None, hidden_states.shape))
        return 2 * hidden_states


@pytest.fixture
def engine(monkeypatch):
    """What was asked of `autocast`."""
    asked = []

    def autocast(enabled, recipe):
        asked.append((enabled, recipe))
        return contextlib.nullcontext()

    pytorch = types.ModuleType("transformer_engine.pytorch")
    vars(pytorch).update(TransformerLayer=Layer, autocast=autocast, RotaryPositionEmbedding=lambda *_, **__: torch.ones)
    recipes = types.SimpleNamespace(
        Float8CurrentScaling=lambda fp8_format: f"current {fp8_format}", Format=types.SimpleNamespace(E4M3="e4m3")
    )
    common = types.ModuleType("transformer_engine.common")
    common.recipe = recipes
    package = types.ModuleType("transformer_engine")
    package.pytorch, package.common = pytorch, common
    for module in (package, pytorch, common):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("opt-2.6b", (2560, 32, True, "relu", "LayerNorm")),
        ("llama-3-8b", (4096, 8, False, "swiglu", "RMSNorm")),
    ],
)
def test_the_layer_has_the_model_s_shape(name, seen, engine):
    model = MODELS[name]
    made = te_block.TeBlock(model, 8, device="cpu")
    x = torch.ones(16, model.hidden)
    assert torch.equal(made(x), 2 * x) and torch.equal(made(x), 2 * x)
    assert made.block.seen == seen and not engine
    shape, rope = (2, 8, model.hidden), name == "llama-3-8b"
    assert made.block.first == [(True, rope, shape), (False, rope, shape)], "weights are rounded once"


def test_fp8_is_asked_for(engine):
    te_block.TeFloat8Block(TINY, 8, device="cpu")(torch.ones(8, TINY.hidden))
    assert engine == [(True, "current e4m3")]


def test_without_it_one_line_says_what_is_left_out(monkeypatch, capsys):
    pytest.importorskip("slope_megatron.bench.peers")
    monkeypatch.setattr(te_block, "is_installed", lambda: False)
    assert not {"te-bf16", "te-fp8"} & set(bench_peers.all_peers())
    said = capsys.readouterr().err
    assert said == "Transformer Engine is not installed: its blocks, te-bf16 and te-fp8, are left out\n"
    monkeypatch.setattr(te_block, "is_installed", lambda: True)
    assert {"te-bf16", "te-fp8"} <= set(bench_peers.all_peers())
