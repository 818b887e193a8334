"""What a model is trained for: how it is called on a micro-batch, and the loss of what it returns.

Batches are dicts of tensors `[b, s]` unless said otherwise, on the model's device.
"""

import torch

Batch = dict[str, torch.Tensor]


def masked_mean(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of per-token losses over the tokens that count; 0 where none does (a very short BERT sample)."""
    return (losses.float() * mask).sum() / mask.sum().clamp(min=1)


class CausalLanguageModel:
    """The next token. Batch: tokens, labels, loss_mask, position_ids."""

    @staticmethod
    def forward(model: torch.nn.Module, batch: Batch):
        """Per-token losses `[b, s]` on the last pipeline stage; causal attention needs no mask tensor."""
        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    @staticmethod
    def loss(batch: Batch, output) -> torch.Tensor:
        """Mean cross-entropy in nats per token."""
        return masked_mean(output, batch["loss_mask"])

    @staticmethod
    def token_losses(output) -> torch.Tensor:
        """`[b, s]`, for validation."""
        return output


class MaskedLanguageModel:
    """BERT: hidden tokens, and whether the second sentence follows the first.

    Batch: tokens, labels, loss_mask (1 where a token was hidden), padding_mask (1 where a token is real), types (which
    sentence), and is_next `[b]` (1: the second sentence follows).
    """

    @staticmethod
    def forward(model: torch.nn.Module, batch: Batch):
        """`(per-token losses [b, s], next-sentence logits [b, 2])` on the last pipeline stage."""
        return model(batch["tokens"], batch["padding_mask"], batch["types"], lm_labels=batch["labels"])

    @staticmethod
    def loss(batch: Batch, output) -> torch.Tensor:
        """Mean cross-entropy of the hidden tokens plus that of the next-sentence choice (BERT, section 3.1)."""
        losses, next_logits = output
        follows = torch.nn.functional.cross_entropy(next_logits.float(), batch["is_next"])
        return masked_mean(losses, batch["loss_mask"]) + follows

    @staticmethod
    def token_losses(output) -> torch.Tensor:
        """`[b, s]`, for validation: of the hidden tokens alone."""
        return output[0]


OBJECTIVES: dict[str, type[CausalLanguageModel | MaskedLanguageModel]] = {
    "gpt": CausalLanguageModel,
    "bert": MaskedLanguageModel,
}
