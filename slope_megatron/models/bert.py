"""BERT as published: an encoder with its norms after the residual sums, put together from Megatron's parts.

    embedding   x = LN(word + position + token type)
    block       x = LN(x + Attention(x));  x = LN(x + MLP(x))
    MLM head    logits = LN(GELU(x W^T + b)) E^T + c          E the (tied) word embedding
    NSP head    logits = tanh(x_0 P^T + p) W^T + b            x_0 the first token

Megatron's own BertModel is not this: its norms are before the linears and its embedding has none (post-LN, section 3.1
of arXiv 1810.04805 after arXiv 1706.03762). Its block's linears become sparse through the same table as GPT's.
"""

import copy

import torch
from megatron.core import tensor_parallel
from megatron.core.models.bert.bert_lm_head import BertLMHead
from megatron.core.models.bert.pooler import Pooler
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import get_linear_layer

from slope_megatron.config import ModelConfig, SlopeConfig
from slope_megatron.layers.norm import own_norm
from slope_megatron.models.layer_spec import stage_specs
from slope_megatron.models.loss import LanguageLoss

TOKEN_TYPES = 2


def stock_norm(config: TransformerConfig) -> torch.nn.Module:
    """A norm over the hidden size, of Megatron's local spec: apex's where it is installed, else torch's."""
    norm = own_norm(get_gpt_layer_local_spec(normalization=config.normalization).submodules.input_layernorm)
    return norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class PostNormLayer(TransformerLayer):
    """Megatron's transformer layer with its two norms after the residual sums instead of before the linears."""

    def __init__(self, config: TransformerConfig, *arguments, **keywords):
        super().__init__(config, *arguments, **keywords)
        self.post_attention_layernorm = stock_norm(config)
        self.post_mlp_layernorm = stock_norm(config)

    def _forward_attention(self, *arguments, **keywords):
        hidden, context = super()._forward_attention(*arguments, **keywords)
        return self.post_attention_layernorm(hidden), context

    def _forward_mlp(self, *arguments, **keywords):
        return self.post_mlp_layernorm(super()._forward_mlp(*arguments, **keywords))


def post_norm_spec(config: TransformerConfig) -> ModuleSpec:
    """The stock block's spec without its norms, for `PostNormLayer`; attention sees both sides."""
    stock = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    spec = copy.deepcopy(stock)
    parts = spec.submodules
    spec.module = PostNormLayer
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    parts.sharded_state_dict_keys_map = {}
    parts.self_attention.params = {"attn_mask_type": AttnMaskType.padding}
    return spec


def encoder_spec(slope: SlopeConfig, config: TransformerConfig) -> TransformerBlockSubmodules:
    """The specs of this pipeline stage's blocks. No last norm: the last block ends with one."""
    specs = stage_specs(post_norm_spec(config), slope, config)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=None)


class BertEmbedding(LanguageModelEmbedding):
    """Megatron's embedding with a norm before its dropout."""

    def __init__(self, config: TransformerConfig, **keywords):
        super().__init__(config, **keywords)
        self.embedding_dropout = torch.nn.Identity()
        self.norm = stock_norm(config)
        self.dropout = torch.nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids, position_ids, tokentype_ids=None) -> torch.Tensor:
        """Tokens `[b, s]` -> `[s, b, h]`, or this rank's part of the sequence."""
        embeddings = self.norm(super().forward(input_ids, position_ids, tokentype_ids))
        if not self.config.sequence_parallel:
            return self.dropout(embeddings)
        # Each rank drops in its own part of the sequence.
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return self.dropout(embeddings)


class MaskedTokenHead(BertLMHead):
    """Megatron's, with a norm that takes a part of the sequence."""

    def __init__(self, config: TransformerConfig):
        # Its constructor builds Megatron's own norm, which refuses parts.
        whole_sequence = copy.copy(config)
        whole_sequence.sequence_parallel = False
        super().__init__(config.hidden_size, whole_sequence)
        self.layer_norm = stock_norm(config)
        for parameter in self.dense.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class BertForPretraining(LanguageLoss):
    """This rank's shard of the encoder with both heads.

    Called as `model(input_ids, attention_mask, tokentype_ids, lm_labels, loss_mask)`: `[b, s]` each, all but the first
    optional; the attention mask is 1 where a token is real, the loss mask as in `LanguageLoss.losses`. Returns
    `(MLM logits [b, s, v], NSP logits [b, 2])`, v this rank's part of the vocabulary; with labels
    `(MLM loss [b, s], NSP logits)`; and before the last pipeline stage the hidden states.
    """

    def __init__(
        self,
        config: TransformerConfig,
        slope: SlopeConfig,
        *,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool,
        post_process: bool,
        share_embeddings_and_output_weights: bool,
    ):
        super().__init__(config=config)
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = BertEmbedding(
                config,
                vocab_size=vocab_size,
                max_sequence_length=max_sequence_length,
                num_tokentypes=TOKEN_TYPES,
            )
        self.encoder = TransformerBlock(
            config, encoder_spec(slope, config), pre_process=pre_process, post_process=post_process
        )
        if post_process:
            self.lm_head = MaskedTokenHead(config)
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=True,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
            )
            self.pooler = Pooler(config.hidden_size, config.init_method, config, config.sequence_parallel)
            self.binary_head = get_linear_layer(
                config.hidden_size, 2, config.init_method, config.perform_initialization
            )
        # Megatron's plain linears and embeddings ignore `params_dtype`.
        self.to(config.params_dtype)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    @property
    def decoder(self) -> TransformerBlock:
        """The blocks, by the name that they have in a GPTModel, for code that serves both."""
        return self.encoder

    def set_input_tensor(self, input_tensor) -> None:
        """What the previous pipeline stage sent; called by Megatron's schedules."""
        self.encoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, input_ids, attention_mask=None, tokentype_ids=None, lm_labels=None, loss_mask=None):
        # True where attention is forbidden, [b, 1, 1, s]: every token sees the real ones.
        forbidden = None if attention_mask is None else (attention_mask < 0.5)[:, None, None, :]
        hidden = None
        if self.pre_process:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            types = torch.zeros_like(input_ids) if tokentype_ids is None else tokentype_ids
            hidden = self.embedding(input_ids, positions, types)
        hidden = self.encoder(hidden_states=hidden, attention_mask=forbidden)
        if not self.post_process:
            return hidden
        binary_logits = self.binary_head(self.pooler(hidden, 0))
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        hidden = self.lm_head(hidden)
        if lm_labels is not None:
            return self.losses(hidden, lm_labels, loss_mask, weight), binary_logits
        logits, _ = self.output_layer(hidden, weight=weight)
        return logits.transpose(0, 1).contiguous(), binary_logits


def check_bert(model: ModelConfig) -> None:
    """Refuse architectures that this BERT cannot have."""
    required = {"position": "learned", "normalization": "LayerNorm", "linear_bias": True, "gated_mlp": False}
    for name, value in required.items():
        if getattr(model, name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is {getattr(model, name)} with --architecture bert: it must be {value}; "
                "take --architecture gpt for other shapes"
            )
