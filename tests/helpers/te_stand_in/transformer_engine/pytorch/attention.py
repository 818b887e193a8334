"""DotProductAttention as Megatron builds it; over context-parallel ranks with all keys and values gathered.

Of 2 C pieces of a sequence rank r of C has pieces r and 2 C - 1 - r, as Megatron hands them out.
"""

import torch
import torch.distributed as dist


class Gather(torch.autograd.Function):
    """All ranks' parts, one after the other; backward sums the gradients of each part over the ranks."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.group.rank()], None


def places(length: int, ranks: int, rank: int) -> torch.Tensor:
    """The positions, in the whole sequence, of a rank's `length` tokens."""
    size = length // 2
    return torch.cat([torch.arange(size) + size * piece for piece in (rank, 2 * ranks - 1 - rank)])


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.1,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ):
        super().__init__()
        assert attention_dropout == 0.0, "the stand-in drops nothing"
        assert cp_group is None or len(cp_global_ranks) == cp_group.size()
        self.softmax_scale, self.cp_group = softmax_scale, cp_group
        self.grouped = num_gqa_groups not in (None, num_attention_heads)

    def forward(self, query, key, value, attention_mask=None, attn_mask_type: str = "causal"):
        """Query `[s, b, heads, d]`, key and value `[s, b, groups, d]` -> `[s, b, heads * d]`."""
        length, mask = query.shape[0], None
        if attn_mask_type == "causal":
            ranks, rank = (self.cp_group.size(), self.cp_group.rank()) if self.cp_group else (1, 0)
            keys = torch.cat([places(length, ranks, other) for other in range(ranks)])
            if self.cp_group:
                key, value = (Gather.apply(tensor, self.cp_group).flatten(0, 1) for tensor in (key, value))
            mask = places(length, ranks, rank)[:, None] >= keys[None]
        elif attention_mask is not None:
            mask = ~attention_mask
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.softmax_scale, enable_gqa=self.grouped
        )
        return context.permute(2, 0, 1, 3).flatten(-2)
