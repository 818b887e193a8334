"""The model of a configuration: megatron-core's GPTModel (or our BERT), built without numbers, then initialised."""

import functools

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from slope_megatron.config import Config, ModelConfig
from slope_megatron.layers.mlp import fuse_mlps
from slope_megatron.models.bert import BertForPretraining, check_bert
from slope_megatron.models.init_weights import init_weights
from slope_megatron.models.layer_spec import block_spec, mark_head_norms
from slope_megatron.models.loss import LanguageLoss, cut_loss
from slope_megatron.models.shapes import padded_rows
from slope_megatron.versions import check_core

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
ACTIVATIONS = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
# Megatron's settings for each `--recompute`.
RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(config: Config, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the blocks. Initialisation is off: `init_weights` does it, alike at every layout."""
    model, parallel = config.model, config.parallel
    gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated_mlp,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        add_bias_linear=model.linear_bias,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel > 1,
        **RECOMPUTE[parallel.recompute],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        perform_initialization=False,
        use_cpu_initialization=not gpu,
        deterministic_mode=gpu and config.train.deterministic,
        # Megatron compiles these with torch.compile, which takes 20 s on a CPU and gives nothing there.
        bias_dropout_fusion=gpu,
        # The fused loss hands the logits a gradient that it has rounded to bf16, whatever their type.
        cross_entropy_loss_fusion=gpu and dtype == torch.bfloat16,
        # Fusions that need apex or Transformer Engine, or for which there is a module of our own.
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )


class Gpt(LanguageLoss, GPTModel):
    """Megatron's GPTModel; called with labels it gives losses, of whole logits or in chunks."""

    def _postprocess(self, hidden_states, *arguments, labels=None, loss_mask=None, **keywords):
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *arguments, labels=labels, loss_mask=loss_mask, **keywords)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.losses(hidden_states, labels, loss_mask, weight)


def padded_vocabulary(model: ModelConfig, tokenizer_size: int) -> int:
    """`padded_rows` of a vocabulary that has an entry for each token."""
    if model.vocab_size is not None and model.vocab_size < tokenizer_size:
        raise ValueError(
            f"--vocab-size is {model.vocab_size} and the data's tokenizer has {tokenizer_size} tokens: "
            "the model needs an entry for each; raise it, or leave it unset"
        )
    return padded_rows(model, tokenizer_size)


def build_bare_model(config: Config, tokenizer_size: int, dtype: torch.dtype) -> LanguageModule:
    """This rank's shard of the model, with memory but without numbers; on the `meta` device not even that.

    Raises:
        ValueError: what `padded_vocabulary` refuses, or this version of megatron-core.
    """
    check_core(megatron.core.__version__)
    blocks = transformer_config(config, dtype)
    ends = {
        "vocab_size": padded_vocabulary(config.model, tokenizer_size),
        "max_sequence_length": config.model.max_positions or config.data.seq_length,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "share_embeddings_and_output_weights": config.model.tie_embeddings,
    }
    if config.model.architecture == "bert":
        check_bert(config.model)
        model = BertForPretraining(blocks, config.slope, **ends)
    else:
        learned = config.model.position == "learned"
        # Our attention applies rotary positions itself, in one kernel; Megatron's model would apply them unfused.
        spec = block_spec(config.slope, blocks, None if learned else config.model.rotary_base)
        model = Gpt(blocks, spec, position_embedding_type="learned_absolute" if learned else "none", **ends)
    fuse_mlps(model)
    mark_head_norms(model)
    cut_loss(model, config)
    # Megatron's position table ignores `params_dtype`.
    return model.to(dtype)


def to_own_device(model: torch.nn.Module) -> torch.nn.Module:
    """Move a bare model to this rank's GPU, if it has one: Megatron makes norms and position tables on the CPU."""
    return model.cuda() if torch.cuda.is_available() else model


def build_model(config: Config, tokenizer_size: int, dtype: torch.dtype) -> LanguageModule:
    """This rank's shard of the model, initialised: the same weights at every layout."""
    # First move, then initialise: numbers are generated on the device that holds the shard.
    model = to_own_device(build_bare_model(config, tokenizer_size, dtype))
    init_weights(model, seed=config.train.seed, init_std=config.model.init_std, num_layers=config.model.num_layers)
    return model
