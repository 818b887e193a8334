"""LinearCrossEntropy: output layer and loss in one, over chunks of tokens, so that logits never exist whole.

T tokens, H hidden, V entries of the vocabulary on this rank; y the labels, m the loss mask, one row of each a token.

    forward   z_TV = x_TH @ w_VH^T + b_V;   loss_T = n_T - z[y],   n_T = log sum exp(z), over all ranks' V
    dgrad     dz_TV = ((1 + 2 c n_T) softmax(z) - [y]) m_T g;   dx_TH = dz @ w
    wgrad     dw_VH = dz^T @ x;   db_V = sum_T dz

c is the coefficient of a z-loss, c n_T^2 a token: its gradient joins that of the losses, whose values stay without it.

g is the gradient of the losses, which must be one number times the mask: so it factors out, and forward can make the
gradients of each chunk while its logits are there. Backward multiplies them by g. Nothing is computed twice, and dx and
dw are all that is held between the two. dw is added up over the chunks in its own type: each chunk rounds once, and so
does the multiplication with g.

The loss mask is part of this because dw is a sum over tokens: what a token counts must be known in forward.
"""

from typing import Any

import torch
import torch.distributed as dist

from slope_megatron.layers.fused import scale_
from slope_megatron.ops.custom_ops.cross_entropy import label_statistics, logit_gradient_


class LinearCrossEntropy(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        w_VH: torch.Tensor,
        b_V: torch.Tensor | None,
        labels_T: torch.Tensor,
        mask_T: torch.Tensor | None,
        chunk: int,
        group: dist.ProcessGroup,
        z_loss: float = 0.0,
    ) -> torch.Tensor:
        """Losses `[T]`, in fp32 at least.

        Args:
            x_TH: whole on every rank; its gradient is this rank's part of a sum over `group`.
            labels_T: of the whole vocabulary.
            mask_T: None: no gradients are asked for.
            chunk: tokens at once.
            group: the ranks that share the vocabulary, this rank's rows being next to the last rank's.
        """
        local_T = labels_T - group.rank() * w_VH.shape[0]
        want_x, want_w, want_b = (mask_T is not None and needed for needed in ctx.needs_input_grad[:3])
        dx_TH = torch.empty_like(x_TH) if want_x else None
        dw_VH = torch.empty_like(w_VH) if want_w else None
        db_V = torch.zeros_like(b_V) if b_V is not None and want_b else None
        losses = []
        for start in range(0, x_TH.shape[0], chunk):
            tokens = slice(start, start + chunk)
            x = x_TH[tokens]
            z = x @ w_VH.t() if b_V is None else torch.addmm(b_V, x, w_VH.t())
            normalizer, chosen = label_statistics(z, local_T[tokens])
            if group.size() > 1:
                normalizer, chosen = over_ranks(normalizer, chosen, group)
            losses.append(normalizer - chosen)
            if mask_T is not None and (want_x or want_w or want_b):
                logit_gradient_(z, local_T[tokens], normalizer, mask_T[tokens], z_loss)
            if dx_TH is not None:
                torch.mm(z, w_VH, out=dx_TH[tokens])
            if dw_VH is not None:
                dw_VH.addmm_(z.t(), x, beta=0 if start == 0 else 1)
            if db_V is not None:
                db_V += z.sum(0)
            del z  # before the next chunk's are made
        ctx.gradients, ctx.mask = (dx_TH, dw_VH, db_V), mask_T
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a loss in chunks are used up by its first backward")
        scale = common_factor(gradients[0], ctx.mask)
        found = [None if part is None else scale_(part, scale) for part in ctx.gradients]
        ctx.gradients = None
        return *found, None, None, None, None, None


def over_ranks(
    normalizer_T: torch.Tensor, chosen_T: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp over all ranks' logits, and the label's logit, which one rank has and the others have as 0."""
    largest = normalizer_T.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack((torch.exp(normalizer_T - largest), chosen_T))
    dist.all_reduce(sums, group=group)
    return largest + sums[0].log(), sums[1]


def common_factor(gradient_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """The number `[1]` whose product with the mask is the gradient; not a number where there is none.

    Nothing waits for the device here: a gradient of another form shows as a step whose gradients are not finite.
    """
    place = mask_T.abs().argmax().view(1)
    largest, there = gradient_T.index_select(0, place), mask_T.index_select(0, place)
    factor = torch.where(there == 0, 0.0, largest / there)
    fits = torch.isclose(gradient_T, factor * mask_T, rtol=1e-5, atol=0.0).all()
    return torch.where(fits, factor, torch.nan)
