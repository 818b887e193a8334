"""What a model is trained for: how it is called on a micro-batch, and the loss of what it returns.

Batches are dicts of tensors `[b, s]` unless said otherwise, on the model's device.

The loss of a step is a sum over the tokens (for sentence pairs: samples) that count in its global batch, divided by
their number N there. Schedules and ZeRO average over the M micro-batches of each of D replicas; so a micro-batch's loss
is its own sum divided by what a micro-batch counts on average, n = N / (M D):

    1 / (M D)  sum_micro-batches (sum_tokens loss / n)  =  sum_tokens loss / N

whatever the micro-batches' size is, and however unevenly the tokens that count fall on them.
"""

import torch

Batch = dict[str, torch.Tensor]


def counts(batch: Batch) -> torch.Tensor:
    """How many tokens count in a batch, and its samples: `[2]`, fp64."""
    mask = batch["loss_mask"]
    tokens = mask.sum(dtype=torch.float64)
    return torch.stack([tokens, torch.full_like(tokens, len(mask))])


def masked_mean(losses: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Sum of losses over those that count, in the mask's fp32 at least, divided by `count`."""
    total = (losses * mask).sum()
    return total / count.to(total.dtype)


class CausalLanguageModel:
    """The next token. Batch: tokens, labels, loss_mask, position_ids."""

    @staticmethod
    def forward(model: torch.nn.Module, batch: Batch):
        """Per-token losses `[b, s]` on the last pipeline stage; causal attention needs no mask tensor."""
        known = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
        return model(batch["tokens"], batch["position_ids"], None, **known)

    @staticmethod
    def loss(batch: Batch, output, count: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats per token; `count` `[2]`: the mean `counts` of a micro-batch of this step."""
        return masked_mean(output, batch["loss_mask"], count[0])

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
        known = {"lm_labels": batch["labels"], "loss_mask": batch["loss_mask"]}
        return model(batch["tokens"], batch["padding_mask"], batch["types"], **known)

    @staticmethod
    def loss(batch: Batch, output, count: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the hidden tokens plus that of the next-sentence choice (BERT, section 3.1), each a mean of
        its own; `count` as above."""
        losses, next_logits = output
        logits = next_logits.to(torch.promote_types(next_logits.dtype, torch.float32))
        follows = torch.nn.functional.cross_entropy(logits, batch["is_next"], reduction="sum")
        return masked_mean(losses, batch["loss_mask"], count[0]) + follows / count[1].to(follows.dtype)

    @staticmethod
    def token_losses(output) -> torch.Tensor:
        """`[b, s]`, for validation: of the hidden tokens alone."""
        return output[0]


OBJECTIVES: dict[str, type[CausalLanguageModel | MaskedLanguageModel]] = {
    "gpt": CausalLanguageModel,
    "bert": MaskedLanguageModel,
}
