"""The models whose layers are timed: shipped ones, and one that is small enough to try a benchmark on a CPU."""

import dataclasses

from slope_megatron.config import ModelConfig, shipped
from slope_megatron.models.shapes import block_linears

TENSOR_PARALLEL = {"opt-66b": (1, 2, 3, 4, 8)}


@dataclasses.dataclass(frozen=True)
class Model:
    """One block's shape."""

    name: str
    architecture: ModelConfig

    @property
    def hidden(self) -> int:
        return self.architecture.hidden_size

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        """Sizes at which its products are timed."""
        return TENSOR_PARALLEL.get(self.name, (1, 2, 4, 8))

    def linears(self, tensor_parallel: int = 1) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear on one tensor-parallel rank."""
        linears = block_linears(self.architecture)
        return {name.removeprefix("linear_"): linear.shard(tensor_parallel) for name, linear in linears.items()}


def model_names() -> list[str]:
    """What `shipped_model` knows, and "tiny"."""
    return [*sorted(path.stem for path in shipped.folder("models").glob("*.yaml")), TINY.name]


# Those that block.py's pre-norm blocks describe, with what they are published with.
BLOCK_MODELS = ("opt-2.6b", "opt-6.6b", "opt-13b", "opt-30b", "opt-66b", "llama-3-8b", "mistral-7b")
MODELS = {name: Model(name, shipped.model(name)) for name in BLOCK_MODELS}
TINY = Model("tiny", ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, max_positions=64, vocab_size=100))
