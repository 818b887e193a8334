"""ModelConfig: the architecture, nothing else. `launch/models/NAME.yaml` holds one for each published model."""

import dataclasses

from slope_megatron.config.fields import COUNT, Rule, check_fields, option

BELOW_ONE = Rule("it must be in [0, 1)", lambda value: 0 <= value < 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture only. The defaults are OPT-125M's."""

    architecture: str = option(
        "gpt", "gpt: causal decoder; bert: post-LN encoder with MLM and NSP heads", choices=("gpt", "bert")
    )
    num_layers: int = option(12, "transformer blocks", must=COUNT)
    hidden_size: int = option(768, "width of the residual stream", must=COUNT)
    ffn_hidden_size: int | None = option(None, "width inside the MLP; unset: 4 x hidden size", must=COUNT)
    num_attention_heads: int = option(12, "query heads", must=COUNT)
    num_query_groups: int | None = option(None, "key/value heads (GQA); unset: one per query head", must=COUNT)
    activation: str = option("relu", "MLP activation", choices=("relu", "gelu", "gelu_tanh", "silu"))
    gated_mlp: bool = option(False, "gated MLP (SwiGLU when the activation is silu)")
    normalization: str = option("LayerNorm", "norm of the blocks", choices=("LayerNorm", "RMSNorm"))
    qk_norm: bool = option(
        False, "a norm of each query and key head before attention (and before rotary positions), as Qwen 3"
    )
    norm_eps: float = option(1e-5, "epsilon of the norms")
    position: str = option("learned", "position information", choices=("learned", "rope"))
    max_positions: int | None = option(
        None, "rows of the learned position table; unset: the sequence length", must=COUNT
    )
    rotary_base: int = option(10000, "base of the rotary angles")
    linear_bias: bool = option(True, "biases in the linears")
    tie_embeddings: bool = option(True, "the output layer uses the input embedding's weight")
    dropout: float = option(0.0, "dropout of attention and residual branches", must=BELOW_ONE)
    init_std: float = option(0.02, "standard deviation of the initial weights (output projections: / sqrt(2 x layers))")
    vocab_size: int | None = option(
        None, "entries of the vocabulary; unset: those of the prepared data's tokenizer", must=COUNT
    )
    vocab_multiple: int = option(
        384, "the vocabulary is padded to a multiple of this, whatever the tensor-parallel size", must=COUNT
    )

    def __post_init__(self):
        check_fields(self)
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

    @property
    def ffn(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads
