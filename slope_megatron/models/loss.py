"""The language-model loss: of logits in chunks of tokens where they are large, else of all logits in one pass.

Megatron keeps fp32 copies of the logits, the largest tensors of a step, and passes over them several times.
"""

import logging

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule

from slope_megatron.config import Config
from slope_megatron.layers.linear_cross_entropy import LinearCrossEntropy
from slope_megatron.layers.token_losses import token_losses
from slope_megatron.models.shapes import loss_chunk_tokens

logger = logging.getLogger(__name__)


class LossLayer(tensor_parallel.ColumnParallelLinear):
    """Megatron's output layer, which can go on to the losses without whole logits; `cut_loss` makes one of it."""

    asked_chunk: int | None = 0
    z_loss: float = 0.0

    def chunk(self, tokens: int) -> int:
        """Tokens at once; 0: all of them, as logits."""
        dtype = self.config.params_dtype
        return loss_chunk_tokens(self.asked_chunk, tokens, self.output_size_per_partition, dtype.itemsize)

    def forward(self, input_, weight=None, runtime_gather_output=None, targets=None):
        """As the base class; with `targets` the losses `[b, s]` of hidden states `[s, b, h]`.

        Args:
            targets: labels and loss mask `[b, s]`; the mask may be None where no gradient is recorded. The gradient of
                the losses must be one number times the mask.
        """
        if targets is None:
            return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        labels, mask = targets
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        losses = LinearCrossEntropy.apply(
            hidden.flatten(0, 1),
            self.weight if weight is None else weight,
            self.bias,
            labels.t().flatten(),
            mask.t().flatten() if mask is not None and torch.is_grad_enabled() else None,
            self.chunk(labels.numel()),
            self.tp_group,
            self.z_loss,
        )
        return losses.view(hidden.shape[:2]).t().contiguous()


class LanguageLoss(LanguageModule):
    """Mixed into Megatron's language models."""

    output_layer: LossLayer

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Per-token losses `[b, s]` of labels `[b, s]` and logits `[s, b, V]`: in one pass forward and one backward.

        A cut vocabulary is Megatron's affair, and so are CPUs, but with a z-loss, which Megatron does not have.
        """
        layer = self.output_layer
        if not layer.z_loss and (not logits.is_cuda or self.config.tensor_model_parallel_size > 1):
            return super().compute_language_model_loss(labels, logits)
        # Labels are flattened in the logits' order [s, b]: given transposed labels, the compiler would lay the gradient
        # out transposed too, and a copy would have to undo that.
        losses = token_losses(logits.flatten(0, 1), labels.t().flatten(), layer.z_loss, layer.tp_group)
        return losses.view(logits.shape[:2]).t().contiguous()

    def losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Per-token losses `[b, s]` of the last hidden states `[s, b, h]`, or this rank's part of their sequence.

        Args:
            mask: what the losses will be multiplied by before they are summed. None: that is not known, and with
                gradients only whole logits will do.
            weight: of the output layer where it is not its own.
        """
        known = mask is not None or not torch.is_grad_enabled()
        if known and self.output_layer.chunk(labels.numel()):
            return self.output_layer(hidden, weight=weight, targets=(labels, mask))
        logits, _ = self.output_layer(hidden, weight=weight)
        return self.compute_language_model_loss(labels, logits)


def cut_loss(model: LanguageLoss, config: Config) -> None:
    """Let a built model's last stage compute its loss as `--loss-chunk-tokens` says."""
    if not model.post_process:
        return
    layer, asked = model.output_layer, config.parallel.loss_chunk_tokens
    # Megatron's constructor knows one class alone. Without the loss scale, gradients could leave fp16's range.
    layer.__class__ = LossLayer
    layer.z_loss = config.optimizer.z_loss
    layer.asked_chunk = 0 if layer.config.params_dtype == torch.float16 else asked
    if asked and not layer.asked_chunk:
        logger.info("--loss-chunk-tokens %d is passed over: in fp16 the logits of all tokens are made at once", asked)
    tokens = config.data.micro_batch_size * config.data.seq_length
    if chunk := layer.chunk(tokens):
        logger.info("the loss is computed in chunks of %d of a micro-batch's %d tokens", chunk, tokens)
