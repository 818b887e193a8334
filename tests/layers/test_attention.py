"""SdpaAttention against the formula, grouped queries included."""

import re

import pytest
import torch


def attention_error(groups, backend="auto"):
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slope_megatron.layers.attention import SdpaAttention

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=groups)
    config.attention_backend = AttnBackend[backend]
    layer = SdpaAttention(config, 1, AttnMaskType.causal, "self").double()
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 2, 4, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(6, 2, groups, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    layer.eval()
    with torch.no_grad():
        found = layer(query, key, value, None)
    key, value = (tensor.repeat_interleave(4 // groups, dim=2) for tensor in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / 8**0.5
    scores = scores.masked_fill(torch.triu(torch.ones(6, 6, dtype=torch.bool), 1), float("-inf"))
    expected = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).flatten(2)
    return float((found - expected).abs().max())


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal_attention_equals_the_formula(ranks, groups):
    # Ten fp64 operations on numbers of size one: far under 1e-12.
    assert ranks.run(attention_error, groups, world=1)[0] < 1e-12


@pytest.mark.parametrize("backend", ["flash", "unfused", "local"])
def test_each_backend_equals_the_formula(ranks, backend):
    assert ranks.run(attention_error, 2, backend, world=1)[0] < 1e-12


def backend_that_is_not_there():
    try:
        attention_error(2, "fused")
    except RuntimeError as error:
        return str(error)


def test_a_backend_that_the_machine_does_not_have_is_not_replaced(ranks):
    if torch.cuda.is_available():
        pytest.skip("this machine has fused kernels")
    # One torch says "No available kernel", another "No viable backend for scaled_dot_product_attention".
    assert re.match("No (available kernel|viable backend)", ranks.run(backend_that_is_not_there, world=1)[0])


@pytest.mark.parametrize(
    ("option", "value"), [("softmax_type", "learnable"), ("softmax_type", "off-by-one"), ("qk_clip", True)]
)
def test_another_softmax_is_refused(option, value):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slope_megatron.layers.attention import SdpaAttention

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, **{option: value})
    with pytest.raises(ValueError, match=f"{option} is {value!r}: SdpaAttention has"):
        SdpaAttention(config, 1, AttnMaskType.causal, "self")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_positions_are_megatrons_to_the_bit(dtype):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from slope_megatron.layers.rotary import apply_rope

    x = torch.randn(11, 2, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    speeds = 1.0 / 500000 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    half = torch.outer(torch.arange(11, dtype=torch.float32), speeds)
    angles = torch.cat((half, half), -1)[:, None, None, :]
    assert torch.equal(apply_rope(x, 500000), _apply_rotary_pos_emb_bshd(x, angles))


def test_rotary_positions_of_a_validation_in_inference_mode_serve_training():
    from slope_megatron.layers.rotary import apply_rope

    x = torch.randn(13, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        validated = apply_rope(x, 12345)
    x.requires_grad_()
    trained = apply_rope(x, 12345)
    trained.sum().backward()
    assert torch.equal(trained, validated) and x.grad.isfinite().all()
