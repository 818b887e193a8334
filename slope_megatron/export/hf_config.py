"""Hugging Face's configurations as our architectures, and back: one table a family, read in both directions."""

import dataclasses
from collections.abc import Mapping

from slope_megatron.config import ModelConfig
from slope_megatron.export.experts_model import ExpertsModel
from slope_megatron.export.hf_names import ACTIVATIONS, FAMILIES


@dataclasses.dataclass(frozen=True)
class Fields:
    """How the configurations of one `model_type` say what a ModelConfig says.

    Args:
        architecture: class of transformers.
        names: our field -> theirs.
        absent: their fields that may be left out -> what that means.
        fixed: our fields of which the family has one value.
        kind: of architecture.
        required: their fields that our blocks must find with this value, or absent.
        written: what an export says beside those.
        dropouts: theirs of our one dropout.
    """

    architecture: str
    names: dict[str, str]
    dropouts: tuple[str, ...]
    absent: dict[str, object]
    required: dict[str, object]
    written: dict[str, object] = dataclasses.field(default_factory=dict)
    fixed: dict[str, object] = dataclasses.field(default_factory=dict)
    kind: type[ModelConfig] = ModelConfig


ENDS = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
SIZES = {
    **ENDS,
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
OPT = Fields(
    architecture="OPTForCausalLM",
    names={**SIZES, "ffn_hidden_size": "ffn_dim", "activation": "activation_function"},
    dropouts=("dropout", "attention_dropout"),
    absent={"tie_word_embeddings": True},
    required={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    written={"do_layer_norm_before": True},
)
GPT2 = Fields(
    architecture="GPT2LMHeadModel",
    names={
        **ENDS,
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_positions": "n_positions",
        "ffn_hidden_size": "n_inner",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    },
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    absent={"tie_word_embeddings": True, "n_inner": None},
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
)
LLAMA = Fields(
    architecture="LlamaForCausalLM",
    names={
        **SIZES,
        "num_query_groups": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
        "norm_eps": "rms_norm_eps",
    },
    dropouts=("attention_dropout",),
    absent={"tie_word_embeddings": False, "num_key_value_heads": None},
    required={"attention_bias": False, "mlp_bias": False},
    written={"attention_bias": False, "mlp_bias": False},
    fixed={"gated_mlp": True, "normalization": "RMSNorm", "position": "rope", "linear_bias": False},
)
MISTRAL = dataclasses.replace(
    LLAMA,
    architecture="MistralForCausalLM",
    required={"sliding_window": None},
    written={"attention_bias": False, "sliding_window": None},
)
MIXTRAL = dataclasses.replace(
    MISTRAL,
    architecture="MixtralForCausalLM",
    names={**LLAMA.names, "num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    written={"sliding_window": None},
    kind=ExpertsModel,
)
QWEN3 = dataclasses.replace(
    LLAMA,
    architecture="Qwen3ForCausalLM",
    required={"attention_bias": False, "use_sliding_window": False},
    written={"attention_bias": False, "use_sliding_window": False},
    fixed={**LLAMA.fixed, "qk_norm": True},
)
BERT = Fields(
    architecture="BertForPreTraining",
    names={
        **SIZES,
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
        "norm_eps": "layer_norm_eps",
    },
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    absent={"tie_word_embeddings": True, "hidden_act": "gelu"},
    required={
        "type_vocab_size": 2,
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        # The MLM head's activation is the blocks'; ours is Megatron's, which is the exact GELU.
        "hidden_act": "gelu",
    },
    written={"type_vocab_size": 2},
    fixed={"architecture": "bert"},
)
TABLES = {
    "opt": OPT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen3": QWEN3,
    "bert": BERT,
}
DECODERS = ("opt", "gpt2", "llama", "mistral", "qwen3")
# What a configuration of theirs does not hold: how ours was trained and padded.
OURS_ALONE = ("dropout", "init_std", "vocab_multiple", "ffn_hidden_size", "num_query_groups")


def as_dict(hf_config) -> dict:
    """The fields of a `transformers` configuration, or of a `config.json` that was read.

    Raises:
        ValueError: a model type that we have no table for.
    """
    fields = dict(hf_config) if isinstance(hf_config, Mapping) else hf_config.to_dict()
    if fields.get("model_type") not in FAMILIES:
        raise ValueError(
            f"the Hugging Face model is of type {fields.get('model_type')!r}: the types that can be read are "
            f"{', '.join(FAMILIES)}; add a table to slope_megatron/export/hf_names.py"
        )
    return fields


def model_config(hf_config) -> ModelConfig:
    """The architecture of a Hugging Face configuration (an object, or the mapping in `config.json`).

    Raises:
        ValueError: a type or a setting that our models do not have.
    """
    fields = as_dict(hf_config)
    family = fields["model_type"]
    table = TABLES[family]
    for name, required in table.required.items():
        refuse_unless(family, fields, name, required)
    fields = {**table.absent, **fields}
    values = {ours: fields[theirs] for ours, theirs in table.names.items()} | table.fixed
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"this {family} model's activation is {values['activation']!r}: it must be one of {', '.join(ACTIVATIONS)}"
        )
    values["activation"] = ACTIVATIONS[values["activation"]]
    if family == "gpt2":
        values["ffn_hidden_size"] = values["ffn_hidden_size"] or 4 * values["hidden_size"]
    if family == "opt":
        refuse_unless(family, fields, "word_embed_proj_dim", values["hidden_size"])
    if values.get("position") == "rope":
        values["rotary_base"] = rotary_base(family, fields)
    return table.kind(**values)


def rotary_base(family: str, fields: dict) -> int:
    """
    Raises:
        ValueError: another base, scaling or width of a head than our attention has.
    """
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    refuse_unless(family, {"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", "default")
    width = fields["hidden_size"] // fields["num_attention_heads"]
    refuse_unless(family, {"head_dim": fields.get("head_dim") or width}, "head_dim", width)
    base = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    if base != int(base):
        raise ValueError(
            f"this {family} model has rope_theta = {base!r}: --rotary-base is a whole number; take another"
        )
    return int(base)


def refuse_unless(family: str, fields: dict, name: str, required) -> None:
    got = fields.get(name, required)
    if got != required:
        raise ValueError(
            f"this {family} model has {name} = {got!r}: only models with {required!r} can be read; take one of those"
        )


def fields_of(family: str, model: ModelConfig) -> dict:
    """The fields of config.json for an architecture in one family."""
    table = TABLES[family]
    fields = {theirs: getattr(model, ours) for ours, theirs in table.names.items()}
    fields[table.names["ffn_hidden_size"]] = model.ffn
    fields[table.names["activation"]] = next(name for name, ours in ACTIVATIONS.items() if ours == model.activation)
    if "num_query_groups" in table.names:
        fields[table.names["num_query_groups"]] = model.query_groups
    if "position" in table.fixed:
        base = float(model.rotary_base)
        fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "rope_theta": base}
    if family == "qwen3":
        fields["head_dim"] = model.hidden_size // model.num_attention_heads
    if family == "opt":
        fields["word_embed_proj_dim"] = model.hidden_size
    return {
        "model_type": family,
        "architectures": [table.architecture],
        **fields,
        **table.written,
        **dict.fromkeys(table.dropouts, model.dropout),
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
    candidates: tuple[str, ...] = DECODERS if model.activation == "relu" else ("gpt2", "opt", *DECODERS[2:])
    if model.architecture == "bert":
        candidates = ("bert",)
    if isinstance(model, ExpertsModel):
        candidates = ("mixtral",)
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
