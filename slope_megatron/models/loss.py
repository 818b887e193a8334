"""FusedLoss: the language-model loss in one pass forward and one backward, where one rank has the whole vocabulary.

Megatron's keeps fp32 copies of the logits, the largest tensors of a step, and passes over them several times.
"""

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from slope_megatron.layers.fused import token_losses


class FusedLoss(LanguageModule):
    """Mixed into Megatron's language models, whose own loss is used on CPUs and where TP cuts the vocabulary."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Per-token losses `[b, s]` of labels `[b, s]` and logits `[s, b, V]`."""
        if not logits.is_cuda or self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        # Labels are flattened in the logits' order [s, b]: given transposed labels, the compiler would lay the gradient
        # out transposed too, and a copy would have to undo that.
        losses = token_losses(logits.flatten(0, 1), labels.t().flatten())
        return losses.view(logits.shape[:2]).t().contiguous()
