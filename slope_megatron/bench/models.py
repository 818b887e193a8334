"""The models whose layers are timed: widths as published."""

import dataclasses

from slope_megatron.config import ModelConfig
from slope_megatron.models.shapes import block_linears


@dataclasses.dataclass(frozen=True)
class Model:
    """One block's shape. `groups`: key-value heads, equal to `heads` without grouped queries."""

    name: str
    hidden: int
    ffn: int
    heads: int
    groups: int
    gated: bool
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)

    def linears(self, tensor_parallel: int = 1) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear on one tensor-parallel rank."""
        linears = block_linears(self.architecture)
        return {name.removeprefix("linear_"): linear.shard(tensor_parallel) for name, linear in linears.items()}

    @property
    def architecture(self) -> ModelConfig:
        return ModelConfig(
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            gated_mlp=self.gated,
        )


def opt(name: str, hidden: int, heads: int, **more) -> Model:
    return Model(name, hidden, 4 * hidden, heads, heads, False, **more)


MODELS = {
    model.name: model
    for model in (
        opt("opt-2.6b", 2560, 32),
        opt("opt-6.6b", 4096, 32),
        opt("opt-13b", 5120, 40),
        opt("opt-30b", 7168, 56),
        opt("opt-66b", 9216, 72, tensor_parallel=(1, 2, 3, 4, 8)),
        Model("llama-3-8b", 4096, 14336, 32, 8, True),
        Model("mistral-7b", 4096, 14336, 32, 8, True),
    )
}
# Not a published one: small enough for CPU ranks to try a benchmark on.
TINY = Model("tiny", 64, 256, 4, 4, False)
