"""Hugging Face models as ours: their configuration as a ModelConfig, their weights under canonical names.

    model = model_config(hf_config)
    weights = HfWeights(hf_state_dict, hf_config)      # a mapping {canonical name: whole dense tensor}
    load_dense(our_model, config, weights)             # slope_megatron.models.dense

Tensors are transformed when they are asked for, so the state dict may be one that reads files lazily.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping

import torch

from slope_megatron.config import ModelConfig
from slope_megatron.export.hf_names import ACTIVATIONS, FAMILIES, LEGACY, Family, Row

# -- configuration -----------------------------------------------------------------------------------------------------

# What our blocks cannot do, by family: field -> the value it must have (or be absent).
REQUIRED: dict[str, dict[str, object]] = {
    "opt": {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "bert": {
        "type_vocab_size": 2,
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    },
}


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
    kind = fields["model_type"]
    for name, required in REQUIRED[kind].items():
        refuse_unless(kind, fields, name, required)
    return READERS[kind](fields)


def refuse_unless(kind: str, fields: dict, name: str, required) -> None:
    got = fields.get(name, required)
    if got != required:
        raise ValueError(
            f"this {kind} model has {name} = {got!r}: only models with {required!r} can be read; take one of those"
        )


def activation(kind: str, name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"this {kind} model's activation is {name!r}: it must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _opt(fields: dict) -> ModelConfig:
    refuse_unless("opt", fields, "word_embed_proj_dim", fields["hidden_size"])
    return ModelConfig(
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        ffn_hidden_size=fields["ffn_dim"],
        num_attention_heads=fields["num_attention_heads"],
        activation=activation("opt", fields["activation_function"]),
        max_positions=fields["max_position_embeddings"],
        tie_embeddings=fields.get("tie_word_embeddings", True),
        vocab_size=fields["vocab_size"],
    )


def _llama(fields: dict) -> ModelConfig:
    kind = fields["model_type"]
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    refuse_unless(kind, {"rope_type": scaling}, "rope_type", "default")
    width = fields["hidden_size"] // fields["num_attention_heads"]
    refuse_unless(kind, {"head_dim": fields.get("head_dim") or width}, "head_dim", width)
    base = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    if base != int(base):
        raise ValueError(f"this {kind} model has rope_theta = {base!r}: --rotary-base is a whole number; take another")
    return ModelConfig(
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        ffn_hidden_size=fields["intermediate_size"],
        num_attention_heads=fields["num_attention_heads"],
        num_query_groups=fields.get("num_key_value_heads"),
        activation=activation(kind, fields["hidden_act"]),
        gated_mlp=True,
        normalization="RMSNorm",
        norm_eps=fields["rms_norm_eps"],
        position="rope",
        rotary_base=int(base),
        max_positions=fields["max_position_embeddings"],
        linear_bias=False,
        tie_embeddings=fields.get("tie_word_embeddings", False),
        vocab_size=fields["vocab_size"],
    )


def _gpt2(fields: dict) -> ModelConfig:
    return ModelConfig(
        num_layers=fields["n_layer"],
        hidden_size=fields["n_embd"],
        ffn_hidden_size=fields.get("n_inner") or 4 * fields["n_embd"],
        num_attention_heads=fields["n_head"],
        activation=activation("gpt2", fields["activation_function"]),
        norm_eps=fields["layer_norm_epsilon"],
        max_positions=fields["n_positions"],
        tie_embeddings=fields.get("tie_word_embeddings", True),
        vocab_size=fields["vocab_size"],
    )


def _bert(fields: dict) -> ModelConfig:
    # The MLM head's activation is the blocks'; ours is Megatron's, which is the exact GELU.
    refuse_unless("bert", fields, "hidden_act", "gelu")
    return ModelConfig(
        architecture="bert",
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        ffn_hidden_size=fields["intermediate_size"],
        num_attention_heads=fields["num_attention_heads"],
        activation="gelu",
        norm_eps=fields["layer_norm_eps"],
        max_positions=fields["max_position_embeddings"],
        tie_embeddings=fields.get("tie_word_embeddings", True),
        vocab_size=fields["vocab_size"],
    )


READERS: dict[str, Callable[[dict], ModelConfig]] = {
    "opt": _opt,
    "llama": _llama,
    "mistral": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
}

# -- weights -----------------------------------------------------------------------------------------------------------


def interleave(tensors: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    """Q, K and V `[heads d, ...]` -> `[(H + 2 G) d, ...]`: Megatron's order, group by group."""
    groups = [tensor.unflatten(0, (model.query_groups, -1)) for tensor in tensors]
    return torch.cat(groups, dim=1).flatten(0, 1)


TRANSFORMS: dict[str, Callable[[tuple[torch.Tensor, ...], ModelConfig], torch.Tensor]] = {
    "plain": lambda tensors, _: tensors[0],
    "transpose": lambda tensors, _: tensors[0].t(),
    "qkv": interleave,
    "qkv_split": lambda tensors, model: interleave(tensors[0].chunk(3), model),
    "qkv_conv1d": lambda tensors, model: interleave(tensors[0].t().chunk(3), model),
    "stack": lambda tensors, _: torch.cat(tensors),
    "positions": lambda tensors, _: tensors[0][2:],
}


def table_rows(family: Family, model: ModelConfig) -> list[Row]:
    """The table of a whole model: its ends, an output layer of its own if it has one, and every block."""
    rows = [*family.body, *(() if model.tie_embeddings else family.head)]
    for block in range(model.num_layers):
        rows += [
            (canonical.format(i=block), how, tuple(name.format(i=block) for name in names))
            for canonical, how, names in family.block
        ]
    return rows


class HfWeights(Mapping[str, torch.Tensor]):
    """A Hugging Face state dict under canonical names: `{canonical name: whole dense tensor}`.

    Raises:
        ValueError: a tensor is missing, or there is one that would be silently dropped.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], hf_config):
        fields = as_dict(hf_config)
        family = FAMILIES[fields["model_type"]]
        self.model = model_config(fields)
        self.state = state
        # Their name without the prefix of the body, in today's spelling -> the key in `state`.
        self.keys_by_name = {bare_name(key, family.prefix): key for key in state}
        self.rows = {row[0]: row for row in table_rows(family, self.model)}
        self.check(family)

    def check(self, family: Family) -> None:
        wanted = {name for _, _, names in self.rows.values() for name in names}
        present = set(self.keys_by_name)
        missing = sorted(wanted - present)
        if missing:
            raise ValueError(
                f"the Hugging Face weights lack {len(missing)} of {len(wanted)} tensors, {missing[0]} for one: give "
                "the whole state dict of a model with its language-model heads"
            )
        copies = {copy: original for copy, original in family.ties if copy in present - wanted}
        for copy, original in copies.items():
            if not torch.equal(self.theirs(copy), self.theirs(original)):
                raise ValueError(
                    f"the Hugging Face weights hold a {copy} that is not the {original} it should be tied to: set "
                    "tie_word_embeddings to false in their configuration, or give weights that are tied"
                )
        unknown = [
            name
            for name in sorted(present - wanted - copies.keys())
            if not any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored)
        ]
        if unknown:
            raise ValueError(
                f"the Hugging Face weights have {len(unknown)} tensors with no place in this model, {unknown[0]} for "
                "one: give the state dict that belongs to this configuration"
            )

    def theirs(self, name: str) -> torch.Tensor:
        """A tensor by its name in the table."""
        return self.state[self.keys_by_name[name]]

    def __getitem__(self, name: str) -> torch.Tensor:
        _, how, names = self.rows[name]
        return TRANSFORMS[how](tuple(map(self.theirs, names)), self.model)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def bare_name(name: str, prefix: str) -> str:
    """A name of a state dict as the tables have it."""
    for old, new in LEGACY.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name.removeprefix(prefix)
