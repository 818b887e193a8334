"""Cached steps: on a GPU a captured one is replayed, and gives what the decoder itself gives."""

import pytest
import torch

from slope_megatron.config import ModelConfig
from slope_megatron.inference.decoder import Decoder
from slope_megatron.inference.steps import Steps
from slope_megatron.ops.autotune.trials import random_bits

MODEL = ModelConfig(num_layers=2, hidden_size=128, num_attention_heads=4, max_positions=32, vocab_size=96)


def random_tensors(device, dtype) -> dict[str, torch.Tensor]:
    """Random numbers for MODEL by canonical name, its linears 2:4."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, found = MODEL.hidden_size, {}

    def add(name, *shape):
        found[name] = torch.randn(*shape, device=device, generator=generator).mul(0.2).to(dtype)

    add("embedding.word_embeddings.weight", MODEL.vocab_size, hidden)
    add("embedding.position_embeddings.weight", MODEL.max_positions, hidden)
    shapes = {"self_attention.linear_qkv": (3, 1), "self_attention.linear_proj": (1, 1)}
    for block in range(MODEL.num_layers):
        prefix = f"decoder.layers.{block}."
        for name, (rows, columns) in (shapes | {"mlp.linear_fc1": (4, 1), "mlp.linear_fc2": (1, 4)}).items():
            add(f"{prefix}{name}.weight", rows * hidden, columns * hidden // 2)
            add(f"{prefix}{name}.bias", rows * hidden)
            found[f"{prefix}{name}.weight_pattern"] = random_bits(rows * hidden, columns * hidden, torch.device(device))
        for norm in ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"):
            add(f"{prefix}{norm}weight", hidden)
            add(f"{prefix}{norm}bias", hidden)
    add("decoder.final_layernorm.weight", hidden)
    add("decoder.final_layernorm.bias", hidden)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_are_the_decoder_s(device):
    """To the bit; rows at different positions; one past the cache's end stays in its last slot."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    decoder = Decoder(MODEL, random_tensors(device, dtype), device=device)
    prompt = torch.tensor([[3, 5, 2], [7, 1, 4]], device=device)
    caches = [decoder.new_cache(2, 8), decoder.new_cache(2, 8)]
    for cache in caches:
        decoder(prompt, cache=cache)
    advance = Steps(decoder, caches[0], 2)
    for step in range(6):
        tokens, positions = [5 + step, 30 - step], [2 + step, 3 + step]
        places = torch.tensor(positions, device=device).clamp(max=7)[:, None]
        expected = decoder(torch.tensor(tokens, device=device)[:, None], places, caches[1])[:, -1]
        assert torch.equal(advance(tokens, positions), expected)
    assert (advance.graph is not None) == (device == "cuda")
