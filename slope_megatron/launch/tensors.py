"""Every parameter of a model by name, shape and how tensor parallelism cuts it: from the configuration alone.

Nothing is built, so that a login node can plan a model that fits no login node. `slope plan --check` compares the
counts with a real run, and with the model built on the `meta` device.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

from slope_megatron.config import Config, DataConfig, SlopeConfig
from slope_megatron.models.rules import sparse_linears

FIRST, LAST = "first", "last"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter of the whole model.

    Args:
        shape: of the dense weight, also where only N of M are stored.
        cut: axis cut over the tensor-parallel ranks; None: every rank has all of it.
        place: the block it is in; "first" and "last": the pipeline's ends.
        nm: N and M of a packed weight; None: stored whole.
        masked: a baseline's: stored whole, multiplied as a pruned copy.
        adapter: a low-rank adapter's: without a gradient until the adapters join.
    """

    name: str
    shape: tuple[int, ...]
    cut: int | None
    place: int | str
    nm: tuple[int, int] | None = None
    masked: bool = False
    adapter: bool = False

    @property
    def kind(self) -> str:
        """The field of `Counts` that it adds to."""
        if self.nm:
            return "packed_dense"
        return "masked" if self.masked else "adapters" if self.adapter else "other"

    def elements(self, tensor_parallel: int = 1) -> int:
        """Dense elements on one rank."""
        return math.prod(self.shape) // (tensor_parallel if self.cut is not None else 1)


def block_widths(config: Config) -> dict[str, tuple[int, int, int]]:
    """`linear: (out, in, cut axis)` of one transformer block."""
    model = config.model
    head = model.hidden_size // model.num_attention_heads
    qkv = (model.num_attention_heads + 2 * model.query_groups) * head
    return {
        "linear_qkv": (qkv, model.hidden_size, 0),
        "linear_proj": (model.hidden_size, model.num_attention_heads * head, 1),
        "linear_fc1": (model.ffn * (2 if model.gated_mlp else 1), model.hidden_size, 0),
        "linear_fc2": (model.hidden_size, model.ffn, 1),
    }


@functools.lru_cache(maxsize=4096)
def patterns(slope: SlopeConfig, block: int) -> dict[str, tuple[int, int]]:
    """N and M of a block's packed linears."""
    own = slope.for_block(block)
    if not own.packed:
        return {}
    return {name: (own.n, own.m) for name in sorted(sparse_linears(slope, block))}


@functools.lru_cache(maxsize=4096)
def masked_linears(slope: SlopeConfig, block: int) -> set[str]:
    """A block's linears with a baseline's mask over a dense weight."""
    return set() if slope.for_block(block).packed else sparse_linears(slope, block)


def norm(config: Config, name: str, place: int | str) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (config.model.hidden_size,), None, place)
    if config.model.normalization == "LayerNorm":
        yield Tensor(f"{name}.bias", (config.model.hidden_size,), None, place)


def linear(config: Config, name: str, block: int) -> Iterator[Tensor]:
    """Weight, bias and adapters of one linear."""
    out, width, cut = block_widths(config)[name]
    full = f"decoder.layers.{block}.{name}"
    nm, masked = patterns(config.slope, block).get(name), name in masked_linears(config.slope, block)
    yield Tensor(f"{full}.weight", (out, width), cut, block, nm, masked)
    if config.model.linear_bias:
        # A row-parallel linear adds its bias after the reduction: every rank has all of it.
        yield Tensor(f"{full}.bias", (out,), 0 if cut == 0 else None, block)
    rank = config.slope.rank
    if (nm or masked) and rank:
        yield Tensor(f"{full}.adapter_l", (rank, width), None if cut == 0 else 1, block, adapter=True)
        yield Tensor(f"{full}.adapter_r", (out, rank), 0 if cut == 0 else None, block, adapter=True)


def tensors(config: Config, vocabulary: int) -> Iterator[Tensor]:
    """All parameters of the unsharded model; `vocabulary` before padding. A tied output layer is the embedding's."""
    model = config.model
    padded = padded_vocabulary(config, vocabulary)
    yield Tensor("embedding.word_embeddings.weight", (padded, model.hidden_size), 0, FIRST)
    if model.position == "learned":
        positions = model.max_positions or config.data.seq_length
        yield Tensor("embedding.position_embeddings.weight", (positions, model.hidden_size), None, FIRST)
    if model.architecture == "bert":
        yield from bert_ends(config, padded)
    for block in range(model.num_layers):
        yield from norm(config, f"decoder.layers.{block}.input_layernorm", block)
        yield from norm(config, f"decoder.layers.{block}.pre_mlp_layernorm", block)
        for name in block_widths(config):
            yield from linear(config, name, block)
    if model.architecture == "gpt":
        # A post-norm encoder ends in its last block's own norm.
        yield from norm(config, "decoder.final_layernorm", LAST)
    if not model.tie_embeddings:
        yield Tensor("output_layer.weight", (padded, model.hidden_size), 0, LAST)


def bert_ends(config: Config, padded: int) -> Iterator[Tensor]:
    """What an encoder has beside its blocks: token types, a norm, the MLM and NSP heads. Names are ours."""
    hidden = config.model.hidden_size
    yield Tensor("embedding.tokentype_embeddings.weight", (2, hidden), None, FIRST)
    yield from norm(config, "embedding.norm", FIRST)
    for name in ("lm_head.dense", "pooler.dense"):
        yield Tensor(f"{name}.weight", (hidden, hidden), None, LAST)
        yield Tensor(f"{name}.bias", (hidden,), None, LAST)
    yield from norm(config, "lm_head.layer_norm", LAST)
    yield Tensor("output_layer.bias", (padded,), 0, LAST)
    yield Tensor("binary_head.weight", (2, hidden), None, LAST)
    yield Tensor("binary_head.bias", (2,), None, LAST)


def padded_vocabulary(config: Config, vocabulary: int) -> int:
    multiple = config.model.vocab_multiple
    return -(-vocabulary // multiple) * multiple


def stage_tensors(config: Config, vocabulary: int, pipeline: int, stage: int) -> list[Tensor]:
    """The parameters of one pipeline stage; the last one of several has a copy of a tied embedding."""
    share = config.model.num_layers // pipeline
    blocks = range(stage * share, (stage + 1) * share)
    places = {*blocks, *([FIRST] if stage == 0 else []), *([LAST] if stage == pipeline - 1 else [])}
    found = [tensor for tensor in tensors(config, vocabulary) if tensor.place in places]
    if config.model.tie_embeddings and stage == pipeline - 1 and stage > 0:
        embedding = next(iter(tensors(config, vocabulary)))
        found.append(dataclasses.replace(embedding, name="output_layer.weight", place=LAST))
    return found


@dataclasses.dataclass(frozen=True)
class Counts:
    """Elements on one rank.

    Args:
        packed: kept values of the packed weights; `packed_dense`: what their dense weights would have.
        masked: weights under a baseline's mask.
        other: everything else but adapters.
    """

    packed: int
    packed_dense: int
    masked: int
    other: int
    adapters: int

    @property
    def trained(self) -> int:
        return self.packed + self.masked + self.other + self.adapters


def count(parameters: list[Tensor], tensor_parallel: int) -> Counts:
    """Add up one rank's elements."""
    totals = {"packed": 0, "packed_dense": 0, "masked": 0, "other": 0, "adapters": 0}
    for tensor in parameters:
        elements = tensor.elements(tensor_parallel)
        totals[tensor.kind] += elements
        if tensor.nm:
            totals["packed"] += elements * tensor.nm[0] // tensor.nm[1]
    return Counts(**totals)


def stage_counts(config: Config, vocabulary: int, pipeline: int, stage: int, tensor_parallel: int) -> Counts:
    """Elements on one rank of a pipeline stage. Kept: a planner asks again for other batches, ZeRO stages and nodes."""
    # All that the counts depend on.
    bare = Config(model=config.model, slope=config.slope, data=DataConfig(seq_length=config.data.seq_length))
    return _stage_counts(bare, vocabulary, pipeline, stage, tensor_parallel)


@functools.lru_cache(maxsize=4096)
def _stage_counts(config: Config, vocabulary: int, pipeline: int, stage: int, tensor_parallel: int) -> Counts:
    return count(stage_tensors(config, vocabulary, pipeline, stage), tensor_parallel)
