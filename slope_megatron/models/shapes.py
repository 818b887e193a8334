"""Every tensor of a model: its canonical name and dense shape, how tensor parallelism cuts it, in which block it is.

The one inventory that the planner, FLOP counts, exports and benchmarks read. The names are those of `models.canonical`:
Megatron's, norms under Transformer Engine's fused names. Nothing is built and torch is not imported, so that a login
node can plan a model that fits no login node. The tests compare with built models and published counts.
"""

import dataclasses
import math
from collections.abc import Iterator

from slope_megatron.config import ModelConfig, SlopeConfig
from slope_megatron.models.rules import sparse_linears

# Where a block's two norms are, by architecture: before the linears they feed (and named after them, as Transformer
# Engine fuses them), or after the residual sums.
BLOCK_NORMS = {
    "gpt": ("self_attention.linear_qkv.layer_norm_{kind}", "mlp.linear_fc1.layer_norm_{kind}"),
    "bert": ("post_attention_layernorm.{kind}", "post_mlp_layernorm.{kind}"),
}
STACK = {"gpt": "decoder", "bert": "encoder"}
VOCABULARY_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
# Of one rank's logits: as many are made at once. Beyond this size, in chunks of tokens. Each chunk adds its part to the
# output layer's gradient, which is read and written: at 512 MiB and LLaMA 3's vocabulary 6 % of the layer's own time.
LARGEST_LOGITS = 2**29
# Instead of a block's number, for what is before the first block and behind the last.
FIRST, LAST = "first", "last"


@dataclasses.dataclass(frozen=True)
class Linear:
    """One of a block's four linears: `out` x `width`, and the axis that tensor parallelism cuts: 0 out, 1 in."""

    out: int
    width: int
    cut: int

    def shard(self, tensor_parallel: int) -> tuple[int, int]:
        """`(out, in)` on one tensor-parallel rank."""
        if self.cut == 0:
            return self.out // tensor_parallel, self.width
        return self.out, self.width // tensor_parallel


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter of the whole model.

    Args:
        shape: of the dense weight, also where only N of M are stored.
        cut: axis cut over the tensor-parallel ranks; None: every rank has all of it.
        block: the block it is in; FIRST and LAST: the pipeline's ends.
        nm: N and M of a packed weight; None: stored whole.
        masked: a baseline's: stored whole, multiplied as a pruned copy.
        adapter: a low-rank adapter's: without a gradient until the adapters join.
    """

    name: str
    shape: tuple[int, ...]
    cut: int | None
    block: int | str
    nm: tuple[int, int] | None = None
    masked: bool = False
    adapter: bool = False

    def elements(self, tensor_parallel: int = 1) -> int:
        """Dense elements on one rank."""
        return math.prod(self.shape) // (tensor_parallel if self.cut is not None else 1)


def block_linears(model: ModelConfig) -> dict[str, Linear]:
    """A block's linears, in the order in which a forward pass meets them."""
    head = model.hidden_size // model.num_attention_heads
    qkv = (model.num_attention_heads + 2 * model.query_groups) * head
    return {
        "linear_qkv": Linear(qkv, model.hidden_size, 0),
        "linear_proj": Linear(model.hidden_size, model.num_attention_heads * head, 1),
        "linear_fc1": Linear(model.ffn * (2 if model.gated_mlp else 1), model.hidden_size, 0),
        "linear_fc2": Linear(model.hidden_size, model.ffn, 1),
    }


def qualified(linear: str) -> str:
    """`linear_qkv` -> `self_attention.linear_qkv`: its name within a block."""
    return ("self_attention." if linear in ("linear_qkv", "linear_proj") else "mlp.") + linear


def own_rows(model: ModelConfig, vocabulary: int | None = None) -> int:
    """Entries of the vocabulary: the model's own, else those given (the tokenizer's)."""
    rows = model.vocab_size or vocabulary
    if rows is None:
        raise ValueError("--vocab-size is unset and no tokenizer's size is given: give the vocabulary of the model")
    return rows


def padded_rows(model: ModelConfig, vocabulary: int | None = None) -> int:
    """Rows of the embedding: `own_rows`, padded to a multiple of `vocab_multiple`, at every layout alike."""
    return -(-own_rows(model, vocabulary) // model.vocab_multiple) * model.vocab_multiple


def loss_chunk_tokens(asked: int | None, tokens: int, columns: int, itemsize: int) -> int:
    """Of how many tokens a rank makes logits at once; 0: of all of them, as one tensor.

    Args:
        asked: `--loss-chunk-tokens`; None: all where they take `LARGEST_LOGITS` at most, else equal chunks of a
            multiple of 128 tokens.
        tokens: of a micro-batch.
        columns: of the vocabulary on this rank.
        itemsize: bytes of a logit.
    """
    if asked is not None:
        return min(asked, tokens)
    chunks = -(-tokens * columns * itemsize // LARGEST_LOGITS)
    return 0 if chunks <= 1 else min(tokens, -(-tokens // (128 * chunks)) * 128)


def tensors(
    model: ModelConfig, rows: int, positions: int | None = None, slope: SlopeConfig | None = None
) -> Iterator[Tensor]:
    """All parameters of the unsharded model. A tied output layer is the embedding's.

    Args:
        rows: of the embedding; `padded_rows` for the model as it is built.
        positions: rows of the learned position table where `max_positions` is unset.
        slope: which linears are sparse, with adapters; None: the dense model.
    """
    yield from _ends(model, rows, model.max_positions or positions)
    for block in range(model.num_layers):
        yield from _block(model, slope, block)


def canonical_shapes(model: ModelConfig, rows: int, positions: int | None = None) -> dict[str, tuple[int, ...]]:
    """`{canonical name: dense shape}` of the whole dense model; arguments as for `tensors`."""
    return {tensor.name: tensor.shape for tensor in tensors(model, rows, positions)}


def _norm(model: ModelConfig, pattern: str, block: int | str, width: int | None = None) -> Iterator[Tensor]:
    """Of `width` numbers; None: of the hidden size."""
    for kind in ("weight",) if model.normalization == "RMSNorm" else ("weight", "bias"):
        yield Tensor(pattern.format(kind=kind), (width or model.hidden_size,), None, block)


def _block(model: ModelConfig, slope: SlopeConfig | None, block: int) -> Iterator[Tensor]:
    prefix = f"{STACK[model.architecture]}.layers.{block}."
    for pattern in BLOCK_NORMS[model.architecture]:
        yield from _norm(model, prefix + pattern, block)
    for norm in ("q_layernorm", "k_layernorm") if model.qk_norm else ():
        head = model.hidden_size // model.num_attention_heads
        yield from _norm(model, f"{prefix}self_attention.{norm}.{{kind}}", block, head)
    own = slope.for_block(block) if slope else None
    sparse = sparse_linears(slope, block) if slope else set()
    for name, linear in block_linears(model).items():
        full = prefix + qualified(name)
        packed = own is not None and own.packed and name in sparse
        nm = (own.n, own.m) if own and packed else None
        yield Tensor(f"{full}.weight", (linear.out, linear.width), linear.cut, block, nm, name in sparse and not packed)
        if model.linear_bias:
            # A row-parallel linear adds its bias after the reduction: every rank has all of it.
            yield Tensor(f"{full}.bias", (linear.out,), 0 if linear.cut == 0 else None, block)
        if slope and slope.rank and name in sparse:
            down, up = (slope.rank, linear.width), (linear.out, slope.rank)
            yield Tensor(f"{full}.adapter_l", down, None if linear.cut == 0 else 1, block, adapter=True)
            yield Tensor(f"{full}.adapter_r", up, 0 if linear.cut == 0 else None, block, adapter=True)


def _ends(model: ModelConfig, rows: int, positions: int | None) -> Iterator[Tensor]:
    """Embeddings, last norm and heads."""
    hidden = model.hidden_size
    yield Tensor("embedding.word_embeddings.weight", (rows, hidden), 0, FIRST)
    if model.position == "learned":
        if positions is None:
            raise ValueError("--max-positions is unset: give the rows of the position table, or the sequence length")
        yield Tensor("embedding.position_embeddings.weight", (positions, hidden), None, FIRST)
    if not model.tie_embeddings:
        yield Tensor("output_layer.weight", (rows, hidden), 0, LAST)
    if model.architecture == "gpt":
        yield from _norm(model, "decoder.final_layernorm.{kind}", LAST)
        return
    yield Tensor("embedding.tokentype_embeddings.weight", (2, hidden), None, FIRST)
    yield from _norm(model, "embedding.norm.{kind}", FIRST)
    for head, out in (("lm_head.dense", hidden), ("pooler.dense", hidden), ("binary_head", 2)):
        yield Tensor(f"{head}.weight", (out, hidden), None, LAST)
        yield Tensor(f"{head}.bias", (out,), None, LAST)
    yield from _norm(model, "lm_head.layer_norm.{kind}", LAST)
    yield Tensor("output_layer.bias", (rows,), 0, LAST)
