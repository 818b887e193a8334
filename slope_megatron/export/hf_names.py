"""Hugging Face's names beside ours, family by family: data, not code.

A row is (canonical name, how, Hugging Face's names). `{i}` is the number of the block. How the canonical tensor comes
from theirs, N out, K in, H heads, G key/value groups, d width of a head:

    plain       the same tensor
    transpose   `[K, N]` -> `[N, K]`: GPT-2's Conv1D stores weights as y = x W
    qkv         Q `[H d, ...]`, K and V `[G d, ...]` -> group after group: its queries, its key, its value
    qkv_split   Q, K and V in one tensor `[3 H d]`, then as qkv
    qkv_conv1d  Q, K and V in one Conv1D `[K, 3 H d]`: transposed, then as qkv
    stack       gate above up: `[2 N, K]`
    positions   the table without its first two rows: OPT looks position p up in row p + 2, and never reads rows 0 and 1
"""

import dataclasses

Row = tuple[str, str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Args:
        prefix: what stands before every name of the body; some published files leave it out.
        body, block, head: rows; `head` only counts where the output layer has a weight of its own. `{e}` in a row of a
            block is the number of an expert.
        ties: copies, and the names of what they are copies of (an output layer's weight only where it is tied).
        ignored: names of constants. `*` stands for any text.
    """

    prefix: str
    body: tuple[Row, ...]
    block: tuple[Row, ...]
    head: tuple[Row, ...]
    ties: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()


def _pairs(canonical: str, how: str, *names: str, bias: str | None = None, joint: str = ".") -> tuple[Row, Row]:
    """The rows of a weight and its bias."""
    return (
        (f"{canonical}{joint}weight", how, tuple(f"{name}.weight" for name in names)),
        (f"{canonical}{joint}bias", bias or how, tuple(f"{name}.bias" for name in names)),
    )


WORDS = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
ATTENTION, MLP = "decoder.layers.{i}.self_attention", "decoder.layers.{i}.mlp"
HEAD: tuple[Row, ...] = (("output_layer.weight", "plain", ("lm_head.weight",)),)
# Norms before a linear go by Transformer Engine's fused names.
NORM_JOINT = ".layer_norm_"

OPT = Family(
    prefix="model.",
    body=(
        (WORDS, "plain", ("decoder.embed_tokens.weight",)),
        (POSITIONS, "positions", ("decoder.embed_positions.weight",)),
        *_pairs("decoder.final_layernorm", "plain", "decoder.final_layer_norm"),
    ),
    block=(
        *_pairs(f"{ATTENTION}.linear_qkv", "plain", "decoder.layers.{i}.self_attn_layer_norm", joint=NORM_JOINT),
        *_pairs(f"{ATTENTION}.linear_qkv", "qkv", *(f"decoder.layers.{{i}}.self_attn.{name}_proj" for name in "qkv")),
        *_pairs(f"{ATTENTION}.linear_proj", "plain", "decoder.layers.{i}.self_attn.out_proj"),
        *_pairs(f"{MLP}.linear_fc1", "plain", "decoder.layers.{i}.final_layer_norm", joint=NORM_JOINT),
        *_pairs(f"{MLP}.linear_fc1", "plain", "decoder.layers.{i}.fc1"),
        *_pairs(f"{MLP}.linear_fc2", "plain", "decoder.layers.{i}.fc2"),
    ),
    head=HEAD,
    ties=(("lm_head.weight", "decoder.embed_tokens.weight"),),
)

LLAMA = Family(
    prefix="model.",
    body=(
        (WORDS, "plain", ("embed_tokens.weight",)),
        ("decoder.final_layernorm.weight", "plain", ("norm.weight",)),
    ),
    block=(
        (f"{ATTENTION}.linear_qkv.layer_norm_weight", "plain", ("layers.{i}.input_layernorm.weight",)),
        (
            f"{ATTENTION}.linear_qkv.weight",
            "qkv",
            tuple(f"layers.{{i}}.self_attn.{name}_proj.weight" for name in "qkv"),
        ),
        (f"{ATTENTION}.linear_proj.weight", "plain", ("layers.{i}.self_attn.o_proj.weight",)),
        (f"{MLP}.linear_fc1.layer_norm_weight", "plain", ("layers.{i}.post_attention_layernorm.weight",)),
        (
            f"{MLP}.linear_fc1.weight",
            "stack",
            ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.up_proj.weight"),
        ),
        (f"{MLP}.linear_fc2.weight", "plain", ("layers.{i}.mlp.down_proj.weight",)),
    ),
    head=HEAD,
    ties=(("lm_head.weight", "embed_tokens.weight"),),
    ignored=("*rotary_emb.inv_freq",),
)

EXPERT, EXPERTS = "mlp.experts.experts.{e}", "layers.{i}.block_sparse_moe"
MIXTRAL = dataclasses.replace(
    LLAMA,
    block=(
        *LLAMA.block[:4],
        ("decoder.layers.{i}.mlp.router.weight", "plain", (f"{EXPERTS}.gate.weight",)),
        (
            f"decoder.layers.{{i}}.{EXPERT}.linear_fc1.weight",
            "stack",
            (f"{EXPERTS}.experts.{{e}}.w1.weight", f"{EXPERTS}.experts.{{e}}.w3.weight"),
        ),
        (f"decoder.layers.{{i}}.{EXPERT}.linear_fc2.weight", "plain", (f"{EXPERTS}.experts.{{e}}.w2.weight",)),
    ),
)

QWEN3 = dataclasses.replace(
    LLAMA,
    block=(
        *LLAMA.block,
        (f"{ATTENTION}.q_layernorm.weight", "plain", ("layers.{i}.self_attn.q_norm.weight",)),
        (f"{ATTENTION}.k_layernorm.weight", "plain", ("layers.{i}.self_attn.k_norm.weight",)),
    ),
)

GPT2 = Family(
    prefix="transformer.",
    body=(
        (WORDS, "plain", ("wte.weight",)),
        (POSITIONS, "plain", ("wpe.weight",)),
        *_pairs("decoder.final_layernorm", "plain", "ln_f"),
    ),
    block=(
        *_pairs(f"{ATTENTION}.linear_qkv", "plain", "h.{i}.ln_1", joint=NORM_JOINT),
        *_pairs(f"{ATTENTION}.linear_qkv", "qkv_conv1d", "h.{i}.attn.c_attn", bias="qkv_split"),
        *_pairs(f"{ATTENTION}.linear_proj", "transpose", "h.{i}.attn.c_proj", bias="plain"),
        *_pairs(f"{MLP}.linear_fc1", "plain", "h.{i}.ln_2", joint=NORM_JOINT),
        *_pairs(f"{MLP}.linear_fc1", "transpose", "h.{i}.mlp.c_fc", bias="plain"),
        *_pairs(f"{MLP}.linear_fc2", "transpose", "h.{i}.mlp.c_proj", bias="plain"),
    ),
    head=HEAD,
    ties=(("lm_head.weight", "wte.weight"),),
    # Early files hold the causal mask as a tensor of each block.
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
)

LAYER, THEIRS = "encoder.layers.{i}", "encoder.layer.{i}"
BERT = Family(
    prefix="bert.",
    body=(
        (WORDS, "plain", ("embeddings.word_embeddings.weight",)),
        (POSITIONS, "plain", ("embeddings.position_embeddings.weight",)),
        ("embedding.tokentype_embeddings.weight", "plain", ("embeddings.token_type_embeddings.weight",)),
        *_pairs("embedding.norm", "plain", "embeddings.LayerNorm"),
        *_pairs("pooler.dense", "plain", "pooler.dense"),
        *_pairs("lm_head.dense", "plain", "cls.predictions.transform.dense"),
        *_pairs("lm_head.layer_norm", "plain", "cls.predictions.transform.LayerNorm"),
        ("output_layer.bias", "plain", ("cls.predictions.bias",)),
        *_pairs("binary_head", "plain", "cls.seq_relationship"),
    ),
    block=(
        *_pairs(
            f"{LAYER}.self_attention.linear_qkv",
            "qkv",
            *(f"{THEIRS}.attention.self.{name}" for name in ("query", "key", "value")),
        ),
        *_pairs(f"{LAYER}.self_attention.linear_proj", "plain", f"{THEIRS}.attention.output.dense"),
        *_pairs(f"{LAYER}.post_attention_layernorm", "plain", f"{THEIRS}.attention.output.LayerNorm"),
        *_pairs(f"{LAYER}.mlp.linear_fc1", "plain", f"{THEIRS}.intermediate.dense"),
        *_pairs(f"{LAYER}.mlp.linear_fc2", "plain", f"{THEIRS}.output.dense"),
        *_pairs(f"{LAYER}.post_mlp_layernorm", "plain", f"{THEIRS}.output.LayerNorm"),
    ),
    head=(("output_layer.weight", "plain", ("cls.predictions.decoder.weight",)),),
    ties=(
        ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    ignored=("embeddings.position_ids",),
)

FAMILIES = {
    "opt": OPT,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "qwen3": QWEN3,
    "gpt2": GPT2,
    "bert": BERT,
}
# Hugging Face's names of the activations we have.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
# TensorFlow's names, in the files of early models.
LEGACY = {".gamma": ".weight", ".beta": ".bias"}
