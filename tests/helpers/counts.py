"""Parameters of a dense model by what they are for, from its shapes."""

import math

from slope_megatron.config import ModelConfig
from slope_megatron.models.shapes import canonical_shapes, own_rows


def kind_of(name: str) -> str:
    """Embeddings (an output layer of its own among them), linears' weights, their biases, norms, or BERT's heads."""
    if "norm" in name:
        return "norms"
    if ".layers." in name:
        return "linears" if name.endswith(".weight") else "biases"
    return "embeddings" if name.startswith("embedding.") or name == "output_layer.weight" else "heads"


def count_parameters(model: ModelConfig, rows: int | None = None, positions: int | None = None) -> dict[str, int]:
    """Elements of each kind, and their "total"; `rows` by default without padding, as published counts have it."""
    totals = dict.fromkeys(("embeddings", "linears", "biases", "norms", "heads"), 0)
    for name, shape in canonical_shapes(model, rows or own_rows(model), positions).items():
        totals[kind_of(name)] += math.prod(shape)
    return {**totals, "total": sum(totals.values())}
