"""Every parameter of a model by canonical name and dense shape, from the architecture alone; and their count.

The names are those of `models.canonical`: Megatron's, norms under Transformer Engine's fused names. Nothing is built
and torch is not imported, so a planner can use it anywhere. The tests compare with built models and published counts.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from slope_megatron.config import ModelConfig

# Where a block's two norms are, by architecture: before the linears they feed (and named after them, as Transformer
# Engine fuses them), or after the residual sums.
BLOCK_NORMS = {
    "gpt": ("self_attention.linear_qkv.layer_norm_{kind}", "mlp.linear_fc1.layer_norm_{kind}"),
    "bert": ("post_attention_layernorm.{kind}", "post_mlp_layernorm.{kind}"),
}
STACK = {"gpt": "decoder", "bert": "encoder"}
VOCABULARY_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def padded_rows(model: ModelConfig, vocabulary: int | None = None) -> int:
    """Rows of the embedding: the vocabulary (by default the model's own) padded to a multiple of `vocab_multiple`.

    Raises:
        ValueError: neither is given.
    """
    rows = vocabulary or own_rows(model)
    return -(-rows // model.vocab_multiple) * model.vocab_multiple


def own_rows(model: ModelConfig) -> int:
    """Rows of the embedding without padding: the model's own vocabulary.

    Raises:
        ValueError: it has none.
    """
    if model.vocab_size is None:
        raise ValueError("--vocab-size is unset and no tokenizer's size is given: give the vocabulary of the model")
    return model.vocab_size


def canonical_shapes(model: ModelConfig, rows: int, positions: int | None = None) -> dict[str, tuple[int, ...]]:
    """`{canonical name: dense shape}` of the whole model.

    Args:
        rows: of the embedding; `padded_rows` for the model as it is built.
        positions: rows of the learned position table where `max_positions` is unset.
    """
    shapes = dict(_ends(model, rows, model.max_positions or positions))
    for block in range(model.num_layers):
        prefix = f"{STACK[model.architecture]}.layers.{block}."
        shapes.update((prefix + name, shape) for name, shape in _block(model))
    return shapes


def linear_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """`{linear: (out, in)}` of one block."""
    head = model.hidden_size // model.num_attention_heads
    return {
        "self_attention.linear_qkv": (head * (model.num_attention_heads + 2 * model.query_groups), model.hidden_size),
        "self_attention.linear_proj": (model.hidden_size, model.hidden_size),
        "mlp.linear_fc1": (model.ffn * (2 if model.gated_mlp else 1), model.hidden_size),
        "mlp.linear_fc2": (model.hidden_size, model.ffn),
    }


def _norm(model: ModelConfig, pattern: str) -> Shapes:
    for kind in ("weight",) if model.normalization == "RMSNorm" else ("weight", "bias"):
        yield pattern.format(kind=kind), (model.hidden_size,)


def _block(model: ModelConfig) -> Shapes:
    for pattern in BLOCK_NORMS[model.architecture]:
        yield from _norm(model, pattern)
    for name, shape in linear_shapes(model).items():
        yield f"{name}.weight", shape
        if model.linear_bias:
            yield f"{name}.bias", shape[:1]


def _ends(model: ModelConfig, rows: int, positions: int | None) -> Shapes:
    """Embeddings, last norm and heads."""
    hidden = model.hidden_size
    yield "embedding.word_embeddings.weight", (rows, hidden)
    if model.position == "learned":
        if positions is None:
            raise ValueError("--max-positions is unset: give the rows of the position table, or the sequence length")
        yield "embedding.position_embeddings.weight", (positions, hidden)
    if not model.tie_embeddings:
        yield "output_layer.weight", (rows, hidden)
    if model.architecture == "gpt":
        yield from _norm(model, "decoder.final_layernorm.{kind}")
        return
    yield "embedding.tokentype_embeddings.weight", (2, hidden)
    yield from _norm(model, "embedding.norm.{kind}")
    for head, out in (("lm_head.dense", hidden), ("pooler.dense", hidden), ("binary_head", 2)):
        yield f"{head}.weight", (out, hidden)
        yield f"{head}.bias", (out,)
    yield from _norm(model, "lm_head.layer_norm.{kind}")
    yield "output_layer.bias", (rows,)


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Dense elements by what they are for.

    Args:
        embeddings: words, positions, token types, and an output layer of its own.
        linears: weights of the blocks' linears: what SLoPe makes sparse.
        biases: of the blocks' linears.
        norms: all of them.
        heads: BERT's MLM transform, output bias, pooler and NSP classifier.
    """

    embeddings: int
    linears: int
    biases: int
    norms: int
    heads: int

    @property
    def total(self) -> int:
        return self.embeddings + self.linears + self.biases + self.norms + self.heads


def kind_of(name: str) -> str:
    """The field of ParameterCount that a canonical name belongs to."""
    if "norm" in name:
        return "norms"
    if ".layers." in name:
        return "linears" if name.endswith(".weight") else "biases"
    return "embeddings" if name.startswith("embedding.") or name == "output_layer.weight" else "heads"


def count_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ParameterCount:
    totals = {field.name: 0 for field in dataclasses.fields(ParameterCount)}
    for name, shape in shapes.items():
        totals[kind_of(name)] += math.prod(shape)
    return ParameterCount(**totals)


def count_parameters(model: ModelConfig, rows: int | None = None, positions: int | None = None) -> ParameterCount:
    """Parameters of the dense model; `rows` by default the vocabulary without padding, as published counts have it."""
    rows = rows or padded_rows(dataclasses.replace(model, vocab_multiple=1))
    return count_shapes(canonical_shapes(model, rows, positions))
