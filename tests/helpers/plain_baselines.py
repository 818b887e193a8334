"""The baselines in plain torch, a few lines each: what the trainer's layers, hooks and phases must add up to.

No Megatron linear of ours, no ZeRO: a dense model whose linears are replaced by `PlainLinear`, clipping, AdamW.
"""

import itertools

import torch


def largest(groups, count):
    """`count` largest magnitudes of the last axis, the others zero; by sorting, ties to the first."""
    order = groups.abs().argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order[..., :count], True)
    return keep


def magnitude_mask(weight):
    return largest(weight.unflatten(-1, (-1, 4)), 2).flatten(-2)


def transposable_mask(weight):
    """Block by block, every choice of two places in each row."""
    pairs = [torch.tensor([float(i in pair) for i in range(4)]) for pair in itertools.combinations(range(4), 2)]
    blocks = [torch.stack(rows) for rows in itertools.product(pairs, repeat=4)]
    blocks = torch.stack([block for block in blocks if (block.sum(0) == 2).all()]).double()
    parts = weight.abs().double().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)
    best = torch.einsum("rcij,pij->rcp", parts, blocks).argmax(-1)
    return blocks[best].transpose(1, 2).reshape(weight.shape).bool()


class PlainProduct(torch.autograd.Function):
    """Y = X (S W)^T with the baseline's backward; `state` is the PlainLinear."""

    @staticmethod
    def forward(ctx, x, weight, linear):
        ctx.save_for_backward(x, weight * linear.mask())
        ctx.linear, ctx.place = linear, linear.draws and linear.draws.micro_batch
        return x @ (weight * linear.mask()).t()

    @staticmethod
    def backward(ctx, dy):
        x, masked = ctx.saved_tensors
        linear = ctx.linear
        dy_TN, x_TK = dy.flatten(0, -2), x.flatten(0, -2)
        if linear.masking and linear.method == "srste":
            groups = dy_TN.t().unflatten(-1, (-1, 4))
            dy_TN = (groups * largest(groups, 2)).flatten(-2).t()
        dx = (dy_TN @ masked).view(x.shape)
        if linear.masking and linear.method == "fst":
            dy_TN = linear.estimate(dy_TN, ctx.place)
        return dx, dy_TN.t() @ x_TK, None


class PlainLinear(torch.nn.Module):
    """Takes the place of a Megatron linear that is not cut; keeps its parameters."""

    def __init__(self, stock, method, estimate, draws):
        super().__init__()
        self.weight, self.bias, self.skip_bias_add = stock.weight, stock.bias, stock.skip_bias_add
        self.method, self.estimate, self.draws, self.masking, self.found = method, estimate, draws, True, None

    def mask(self):
        weight = self.weight.detach()
        if not self.masking:
            return torch.ones_like(weight)
        return magnitude_mask(weight) if self.method == "srste" else self.found

    def search(self):
        self.found = transposable_mask(self.weight.detach())

    def forward(self, x):
        y = PlainProduct.apply(x, self.weight, self)
        if self.skip_bias_add:
            return y, self.bias
        return y + self.bias, None
