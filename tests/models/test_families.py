"""Every published model as a configuration; every family against Hugging Face's own; GQA and gated MLPs at TP 3."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from helpers.families import NAMES, VOCABULARY, digest, hf_config, hf_model, our_config, whole_tensors
from helpers.numerics import relative_error
from slope_megatron.config.yaml_file import read_yaml

MODELS = Path(__file__).resolve().parents[2] / "launch" / "models"
# As published: Hugging Face's type, its settings, and the number of parameters that Hugging Face counts.
GPT2 = {"n_positions": 1024, "vocab_size": 50257}
OPT = {"max_position_embeddings": 2048, "vocab_size": 50272}
GQA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}


def opt(layers, hidden, heads):
    return "opt", {
        **OPT,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "word_embed_proj_dim": hidden,
    }


def gpt2(layers, hidden, heads):
    return "gpt2", {**GPT2, "n_layer": layers, "n_embd": hidden, "n_head": heads}


def rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


PUBLISHED = {
    "opt-125m": (*opt(12, 768, 12), 125_239_296),
    "opt-1.3b": (*opt(24, 2048, 32), 1_315_758_080),
    "opt-2.6b": (*opt(32, 2560, 32), 2_651_596_800),
    "opt-6.6b": (*opt(32, 4096, 32), 6_658_473_984),
    "opt-13b": (*opt(40, 5120, 40), 12_853_473_280),
    "opt-30b": (*opt(48, 7168, 56), 29_974_540_288),
    "opt-66b": (*opt(64, 9216, 72), 65_719_701_504),
    "gpt2-small": (*gpt2(12, 768, 12), 124_439_808),
    "gpt2-medium": (*gpt2(24, 1024, 16), 354_823_168),
    "gpt2-large": (*gpt2(36, 1280, 20), 774_030_080),
    "llama-3-8b": (
        "llama",
        {**GQA, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_parameters": rope(500000.0)},
        8_030_261_248,
    ),
    "mistral-7b": (
        "mistral",
        {
            **GQA,
            "vocab_size": 32768,
            "max_position_embeddings": 32768,
            "rope_parameters": rope(1000000.0),
            "sliding_window": None,
        },
        7_248_023_552,
    ),
    "bert-large-uncased": (
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        336_226_108,
    ),
}


def read(name, *flags):
    """The file as `slope pretrain --config` reads it."""
    from slope_megatron.config import add_config_arguments, read_config

    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return read_config(parser.parse_args(["--config", str(MODELS / f"{name}.yaml"), *flags]))[0].model


def hf_count(config) -> int:
    """Parameters of Hugging Face's model, tied ones once; built without memory."""
    import transformers

    auto = transformers.AutoModelForPreTraining if config.model_type == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in auto.from_config(config).parameters())


def test_every_file_is_in_the_table():
    assert {path.stem for path in MODELS.glob("*.yaml")} == set(PUBLISHED)
    assert all(list(read_yaml(path)) == ["model"] for path in MODELS.glob("*.yaml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_is_the_published_model(name):
    import transformers

    from helpers.counts import count_parameters
    from slope_megatron.export.hf_config import model_config
    from slope_megatron.models.shapes import padded_rows

    model = read(name, "--seq-length", "512")
    kind, fields, published = PUBLISHED[name]
    theirs = transformers.AutoConfig.for_model(kind, **fields)
    assert model == model_config(theirs), "the file and Hugging Face's configuration are the same architecture"
    assert hf_count(theirs) == published
    # OPT's position table has two rows that no position reads; ours has not.
    unread = 2 * model.hidden_size if kind == "opt" else 0
    count = count_parameters(model)["total"]
    assert count == published - unread
    # Padding the vocabulary adds rows to the embedding, to an output layer of its own, and to BERT's output bias.
    padding = padded_rows(model) - model.vocab_size
    per_row = model.hidden_size * (1 if model.tie_embeddings else 2) + (kind == "bert")
    assert count_parameters(model, padded_rows(model))["total"] == count + padding * per_row
    assert padding < 384


# -- against Hugging Face ----------------------------------------------------------------------------------------------


def batch():
    """Tokens, a mask that hides the end of the second sample, and token types `[2, 12]`."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    types = (torch.arange(12) > 5).long().expand_as(tokens)
    return tokens, mask, types


def our_logits(config, state, fields):
    """Logits `[2, 12, vocabulary]` of the dense model with Hugging Face's weights in it; BERT: NSP's as well."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from helpers.families import bare_model
    from slope_megatron.export.hf_import import HfWeights
    from slope_megatron.models.dense import load_dense

    model = bare_model(config)
    load_dense(model, config, HfWeights(state, fields))
    model.eval()
    tokens, mask, types = batch()
    with torch.no_grad():
        if config.model.architecture == "bert":
            logits, binary = model(tokens, mask, types)
        else:
            logits, binary = model(tokens, torch.arange(12).expand_as(tokens), None), None
        logits = gather_from_tensor_model_parallel_region(logits)
    return logits[..., :VOCABULARY].clone(), binary


def hf_logits(model):
    tokens, mask, types = batch()
    with torch.no_grad():
        if model.config.model_type == "bert":
            out = model(input_ids=tokens, attention_mask=mask, token_type_ids=types)
            return out.prediction_logits, out.seq_relationship_logits
        return model(input_ids=tokens).logits, None


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_family_computes_what_hugging_face_computes(ranks, name, size):
    from slope_megatron.export.hf_config import model_config

    # Two ranks share heads and groups evenly.
    groups = {"num_attention_heads": 8, "num_key_value_heads": 2} if name in ("llama", "mistral", "qwen3") else {}
    if name == "qwen3":
        groups["head_dim"] = 12
    theirs = hf_config(name, **groups)
    model = hf_model(theirs)
    expected, expected_binary = hf_logits(model)
    config = our_config(model_config(theirs), tensor_parallel=size)
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    for logits, binary in ranks.run(our_logits, config, state, theirs.to_dict(), world=size, tensor_parallel=size):
        # fp64: both take the same sums in another order. The rotary angles are fp32 in both, by the same formula.
        assert relative_error(logits, expected) < 1e-13
        if binary is not None:
            assert relative_error(binary, expected_binary) < 1e-13


# -- GQA and gated MLPs at every TP ------------------------------------------------------------------------------------


def filled_parts(config):
    """This rank's tensors under canonical names, and the logits of its part of the vocabulary gathered."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from helpers.families import filled_model
    from slope_megatron.models.canonical import shards

    model = filled_model(config).eval()
    parts = [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(model)]
    tokens, mask, types = batch()
    with torch.no_grad():
        if config.model.architecture == "bert":
            logits = model(tokens, mask, types)[0]
        else:
            logits = model(tokens, torch.arange(12).expand_as(tokens), None)
        return parts, gather_from_tensor_model_parallel_region(logits).clone()


@pytest.mark.parametrize("name", ["opt", "llama", "bert"])
def test_the_same_seed_gives_the_same_model_at_tp_3(ranks, name):
    from slope_megatron.export.hf_config import model_config
    from slope_megatron.models.shapes import canonical_shapes, padded_rows

    model = dataclasses.replace(model_config(hf_config(name)), init_std=0.1)
    assert name != "llama" or model.query_groups == 3 < model.num_attention_heads
    slope = {"adapter_rank": 4}
    results = {
        size: ranks.run(
            filled_parts, our_config(model, tensor_parallel=size, slope=slope), world=size, tensor_parallel=size
        )
        for size in (1, 3)
    }
    tensors = {size: whole_tensors(parts for parts, _ in found) for size, found in results.items()}
    assert digest(tensors[1]) == digest(tensors[3])
    expected = results[1][0][1]
    for _, logits in results[3]:
        # fp64; only the order of sums differs (DESIGN section 2).
        assert relative_error(logits, expected) < 1e-12
    # The arithmetic's names and shapes are the built model's, packed linears at half their width.
    config = our_config(model)
    shapes = canonical_shapes(config.model, padded_rows(config.model))
    own = {key: tuple(tensor.shape) for key, tensor in tensors[1].items()}
    packed = {key.removesuffix("_pattern") for key in own if key.endswith(".weight_pattern")}
    assert own.keys() - shapes.keys() == {
        key.removesuffix("weight") + leaf
        for key in packed
        for leaf in ("weight_pattern", "weight_column", "adapter_l", "adapter_r")
    }
    for key, shape in shapes.items():
        assert own[key] == ((shape[0], shape[1] // 2) if key in packed else shape), key
