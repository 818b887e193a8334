"""Hugging Face's names and orders of weights: each transformation on numbers one can follow, and what is refused."""

import dataclasses

import pytest
import torch

from helpers.families import NAMES, VOCABULARY, hf_config
from slope_megatron.config import ModelConfig
from slope_megatron.export.hf_config import choose_family, model_config
from slope_megatron.export.hf_import import TRANSFORMS, HfWeights
from slope_megatron.export.hf_names import FAMILIES


def small_state(config):
    """Random tensors by the names that Hugging Face's model has, tied ones the same tensor."""
    import transformers

    auto = transformers.AutoModelForPreTraining if config.model_type == "bert" else transformers.AutoModelForCausalLM
    return dict(auto.from_config(config).state_dict())


# -- transformations ---------------------------------------------------------------------------------------------------


def test_queries_keys_and_values_are_interleaved_group_by_group():
    """4 heads of width 1 in 2 groups: rows are named by what they are."""
    model = ModelConfig(hidden_size=4, num_attention_heads=4, num_query_groups=2)
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    assert TRANSFORMS["qkv"]((q, k, v), model).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    rows = tuple(tensor[:, None].expand(-1, 5) for tensor in (q, k, v))
    assert torch.equal(TRANSFORMS["qkv"](rows, model)[:, 3], TRANSFORMS["qkv"]((q, k, v), model))


def test_heads_wider_than_one_stay_together():
    model = ModelConfig(hidden_size=4, num_attention_heads=2)
    q, k, v = torch.arange(4), torch.arange(4) + 10, torch.arange(4) + 20
    assert TRANSFORMS["qkv"]((q, k, v), model).tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


def test_a_conv1d_of_all_three_is_split_then_interleaved():
    model = ModelConfig(hidden_size=2, num_attention_heads=2)
    weight = torch.arange(12).view(2, 6)  # [K, 3 H d]: columns q0 q1 k0 k1 v0 v1
    expected = weight.t()[[0, 2, 4, 1, 3, 5]]
    assert torch.equal(TRANSFORMS["qkv_conv1d"]((weight,), model), expected)
    assert TRANSFORMS["qkv_split"]((torch.arange(6),), model).tolist() == [0, 2, 4, 1, 3, 5]


def test_the_other_transformations():
    model = ModelConfig()
    table = torch.arange(12).view(4, 3)
    assert torch.equal(TRANSFORMS["plain"]((table,), model), table)
    assert torch.equal(TRANSFORMS["transpose"]((table,), model), table.t())
    assert torch.equal(TRANSFORMS["stack"]((table, table + 100), model), torch.cat((table, table + 100)))
    assert torch.equal(TRANSFORMS["positions"]((table,), model), table[2:])


def test_every_row_of_the_tables_has_a_transformation():
    for family in FAMILIES.values():
        rows = (*family.body, *family.block, *family.head)
        assert {how for _, how, _ in rows} <= TRANSFORMS.keys()
        assert len({canonical for canonical, _, _ in rows}) == len(rows)


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_the_architecture(name, tied):
    from slope_megatron.models.shapes import canonical_shapes

    config = hf_config(name, tie_word_embeddings=tied)
    weights = HfWeights(small_state(config), config.to_dict())
    assert weights.model.tie_embeddings == tied
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    assert found == canonical_shapes(weights.model, VOCABULARY)
    assert len(weights) == len(found)


@pytest.mark.parametrize("name", NAMES)
def test_published_spellings_are_understood(name):
    """Files without the body's prefix, and TensorFlow's names of norms."""
    config = hf_config(name)
    state = small_state(config)
    prefix = FAMILIES[name].prefix
    bare = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    if name == "bert":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, legacy in old.items():
            bare = {key.replace(new, legacy): tensor for key, tensor in bare.items()}
        bare["embeddings.position_ids"] = torch.arange(24)
    expected, found = HfWeights(state, config), HfWeights(bare, config)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_configuration_file_is_as_good_as_an_object():
    """What `config.json` of the published LLaMA-3-8B holds, before and after transformers 5."""
    old = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    }
    new = {**old, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    del new["rope_theta"], new["rope_scaling"]
    assert model_config(old) == model_config(new)
    assert model_config(old).rotary_base == 500000


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "this opt model has do_layer_norm_before = False: only .* with True"),
        ("opt", {"word_embed_proj_dim": 48}, "this opt model has word_embed_proj_dim = 48: only models with 96"),
        ("opt", {"activation_function": "tanh"}, "this opt model's activation is 'tanh': it must be one of relu"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"head_dim": 32}, "head_dim = 32: only models with 16"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type = 'linear': only models with 'default'",
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4 + 0.5}}, "whole number"),
        ("mistral", {"sliding_window": 4096}, "sliding_window = 4096: only models with None"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("bert", {"hidden_act": "relu"}, "hidden_act = 'relu': only models with 'gelu'"),
        ("bert", {"type_vocab_size": 3}, "type_vocab_size = 3"),
    ],
)
def test_what_our_blocks_cannot_do_is_refused(name, change, message):
    fields = {**hf_config(name).to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        model_config(fields)


def test_qk_norm_is_qwen3_s_alone():
    llama = model_config(hf_config("llama"))
    assert choose_family(llama) == "llama"
    assert choose_family(dataclasses.replace(llama, qk_norm=True)) == "qwen3"
    for model in (ModelConfig(qk_norm=True, vocab_size=90), model_config(hf_config("bert"))):
        model = dataclasses.replace(model, qk_norm=True)
        with pytest.raises(ValueError, match=r"qk_norm is True and there it is False.*use `slope export packed`"):
            choose_family(model)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match=r"is of type 'mamba': the types that can be read are opt, llama"):
        model_config({"model_type": "mamba"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.decoder.layers.1.fc2.bias": None}, r"lack 1 of \d+ tensors, decoder.layers.1.fc2.bias for one"),
        (
            {"model.decoder.project_in.weight": torch.zeros(1)},
            "1 tensors that this model does not have, .*decoder.project_in.weight",
        ),
        ({"lm_head.weight": torch.zeros(VOCABULARY, 96)}, "lm_head.weight that is not the decoder.embed_tokens.weight"),
    ],
)
def test_weights_that_do_not_belong_are_refused(change, message):
    config = hf_config("opt")
    state = {**small_state(config), **change}
    with pytest.raises(ValueError, match=message):
        HfWeights({key: tensor for key, tensor in state.items() if tensor is not None}, config)
