"""Our architectures as Hugging Face configurations: the inverse of `hf_import.model_config`, and checked against it."""

import dataclasses

from slope_megatron.config import ModelConfig
from slope_megatron.export.hf_import import model_config
from slope_megatron.export.hf_names import ACTIVATIONS

DECODERS = ("opt", "gpt2", "llama", "mistral")
ARCHITECTURES = {
    "opt": "OPTForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "bert": "BertForPreTraining",
}
# What a configuration of theirs does not hold: how ours was trained and padded.
OURS_ALONE = ("dropout", "init_std", "vocab_multiple", "ffn_hidden_size", "num_query_groups")


def activation_name(activation: str) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def _opt(model: ModelConfig) -> dict:
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "ffn_dim": model.ffn,
        "word_embed_proj_dim": model.hidden_size,
        "activation_function": activation_name(model.activation),
        "do_layer_norm_before": True,
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
    }


def _gpt2(model: ModelConfig) -> dict:
    return {
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn,
        "n_positions": model.max_positions,
        "activation_function": activation_name(model.activation),
        "layer_norm_epsilon": model.norm_eps,
        **{name: model.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
    }


def _llama(model: ModelConfig) -> dict:
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "intermediate_size": model.ffn,
        "hidden_act": activation_name(model.activation),
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "rope_theta": float(model.rotary_base),
        "attention_bias": False,
        "attention_dropout": model.dropout,
    }


def _bert(model: ModelConfig) -> dict:
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn,
        "hidden_act": activation_name(model.activation),
        "layer_norm_eps": model.norm_eps,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "type_vocab_size": 2,
    }


WRITERS = {
    "opt": _opt,
    "gpt2": _gpt2,
    "llama": lambda model: {**_llama(model), "mlp_bias": False},
    "mistral": lambda model: {**_llama(model), "sliding_window": None},
    "bert": _bert,
}


def fields_of(family: str, model: ModelConfig) -> dict:
    """The fields of config.json for an architecture in one family."""
    # GPT-2's own name for the positions is n_positions.
    positions = {} if family == "gpt2" else {"max_position_embeddings": model.max_positions}
    return {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        **WRITERS[family](model),
        **positions,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }


def differences(family: str, model: ModelConfig) -> list[str]:
    """What of this architecture a family cannot express: settings that would come back as others."""
    try:
        back = model_config(fields_of(family, model))
    except ValueError as error:
        return [str(error)]
    found = []
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(model, field.name), getattr(back, field.name)
        position = field.name == "rotary_base" and model.position == "learned"
        if ours != theirs and field.name not in OURS_ALONE and not position:
            found.append(f"{field.name} is {ours} and there it is {theirs}")
    if model.query_groups != back.query_groups:
        found.append(f"num_query_groups is {model.query_groups} and there it is {back.query_groups}")
    return found


def choose_family(model: ModelConfig, asked: str = "auto") -> str:
    """The family that a model is exported as.

    Raises:
        ValueError: none can express it, or not the one that was asked for.
    """
    # In the order in which they are tried. OPT's and GPT-2's shapes differ in the customary activation alone, LLaMA's
    # and Mistral's not at all.
    candidates: tuple[str, ...] = DECODERS if model.activation == "relu" else ("gpt2", "opt", "llama", "mistral")
    if model.architecture == "bert":
        candidates = ("bert",)
    if asked != "auto":
        if asked not in candidates:
            raise ValueError(
                f"--family is {asked}: a model of architecture {model.architecture} can be {', '.join(candidates)}"
            )
        candidates = (asked,)
    refused = {}
    for family in candidates:
        refused[family] = differences(family, model)
        if not refused[family]:
            return family
    nearest = min(refused, key=lambda family: len(refused[family]))
    raise ValueError(
        f"no model of Hugging Face's ({', '.join(candidates)}) is this architecture; the nearest is {nearest}, but "
        f"{'; '.join(refused[nearest])}; use `slope export packed`"
    )
