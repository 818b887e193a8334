"""Elements of a model on one rank, counted from its inventory (`models.shapes`)."""

import dataclasses
import functools
from collections.abc import Iterable

from slope_megatron.config import Config, DataConfig
from slope_megatron.models import shapes
from slope_megatron.models.shapes import FIRST, LAST, Tensor


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


def count(parameters: Iterable[Tensor], tensor_parallel: int) -> Counts:
    """Add up one rank's elements."""
    totals = {field.name: 0 for field in dataclasses.fields(Counts)}
    for tensor in parameters:
        elements = tensor.elements(tensor_parallel)
        if tensor.nm:
            totals["packed_dense"] += elements
            totals["packed"] += elements * tensor.nm[0] // tensor.nm[1]
        else:
            totals["masked" if tensor.masked else "adapters" if tensor.adapter else "other"] += elements
    return Counts(**totals)


def model_tensors(config: Config, vocabulary: int) -> list[Tensor]:
    """The inventory of a configuration's model; `vocabulary` of the tokenizer, for a model without its own."""
    rows = shapes.padded_rows(config.model, vocabulary)
    return list(shapes.tensors(config.model, rows, config.data.seq_length, config.slope))


def stage_tensors(config: Config, vocabulary: int, pipeline: int, stage: int) -> list[Tensor]:
    """The parameters of one pipeline stage; the last one of several has a copy of a tied embedding."""
    share = config.model.num_layers // pipeline
    blocks = range(stage * share, (stage + 1) * share)
    here = {*blocks, *([FIRST] if stage == 0 else []), *([LAST] if stage == pipeline - 1 else [])}
    every = model_tensors(config, vocabulary)
    found = [tensor for tensor in every if tensor.block in here]
    if config.model.tie_embeddings and stage == pipeline - 1 and stage > 0:
        embedding = next(tensor for tensor in every if tensor.name == "embedding.word_embeddings.weight")
        found.append(dataclasses.replace(embedding, name="output_layer.weight", block=LAST))
    return found


def stage_counts(config: Config, vocabulary: int, pipeline: int, stage: int, tensor_parallel: int) -> Counts:
    """Elements on one rank of a pipeline stage. Kept: a planner asks again for other batches, ZeRO stages and nodes."""
    # All that the counts depend on.
    bare = Config(model=config.model, slope=config.slope, data=DataConfig(seq_length=config.data.seq_length))
    return _stage_counts(bare, vocabulary, pipeline, stage, tensor_parallel)


@functools.lru_cache(maxsize=4096)
def _stage_counts(config: Config, vocabulary: int, pipeline: int, stage: int, tensor_parallel: int) -> Counts:
    return count(stage_tensors(config, vocabulary, pipeline, stage), tensor_parallel)
