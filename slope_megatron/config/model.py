"""ModelConfig: the architecture, nothing else. `launch/models/NAME.yaml` holds one for each published model."""

import dataclasses

from slope_megatron.config.fields import check_choices, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture only. The defaults are OPT-125M's."""

    architecture: str = option(
        "gpt", "gpt: causal decoder; bert: post-LN encoder with MLM and NSP heads", choices=("gpt", "bert")
    )
    num_layers: int = option(12, "transformer blocks")
    hidden_size: int = option(768, "width of the residual stream")
    ffn_hidden_size: int | None = option(None, "width inside the MLP; unset: 4 x hidden size")
    num_attention_heads: int = option(12, "query heads")
    num_query_groups: int | None = option(None, "key/value heads (GQA); unset: one per query head")
    activation: str = option("relu", "MLP activation", choices=("relu", "gelu", "gelu_tanh", "silu"))
    gated_mlp: bool = option(False, "gated MLP (SwiGLU when the activation is silu)")
    normalization: str = option("LayerNorm", "norm of the blocks", choices=("LayerNorm", "RMSNorm"))
    norm_eps: float = option(1e-5, "epsilon of the norms")
    position: str = option("learned", "position information", choices=("learned", "rope"))
    max_positions: int | None = option(None, "rows of the learned position table; unset: the sequence length")
    rotary_base: int = option(10000, "base of the rotary angles")
    linear_bias: bool = option(True, "biases in the linears")
    tie_embeddings: bool = option(True, "the output layer uses the input embedding's weight")
    dropout: float = option(0.0, "dropout of attention and residual branches")
    init_std: float = option(0.02, "standard deviation of the initial weights (output projections: / sqrt(2 x layers))")
    vocab_size: int | None = option(None, "entries of the vocabulary; unset: those of the prepared data's tokenizer")
    vocab_multiple: int = option(
        384, "the vocabulary is padded to a multiple of this, whatever the tensor-parallel size"
    )

    def __post_init__(self):
        check_choices(self)
        for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"--hidden-size is {self.hidden_size} with {self.num_attention_heads} heads: the heads must divide it; "
                f"take a multiple of {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"--num-query-groups is {self.query_groups} with {self.num_attention_heads} heads: it "
                "must divide the heads"
            )
        for name in ("ffn_hidden_size", "num_query_groups", "max_positions", "vocab_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1, or unset"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--dropout is {self.dropout}: it must be in [0, 1)")

    @property
    def ffn(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads
