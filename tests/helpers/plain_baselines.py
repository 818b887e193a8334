"""The baselines in plain torch, a few lines each: what the trainer's layers, hooks and phases must add up to.

No Megatron linear of ours, no ZeRO: a dense model whose linears are replaced by `PlainLinear`, clipping, AdamW.
"""

import dataclasses
import itertools

import torch

from helpers.models import VOCABULARY, step_batches
from helpers.plain_training import parts_of_loss


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


def soft_threshold(weight):
    """Group by group: what exceeds the second smallest magnitude."""
    groups = weight.unflatten(-1, (-1, 4))
    threshold = groups.abs().sort(dim=-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - threshold).relu()).flatten(-2)


class TokenOrder:
    """dY `[s, b, N]` as `[T, N]` in which groups are neighbours, and back."""

    def __init__(self, token_groups):
        self.swapped = token_groups == "sequence"

    def flat(self, x):
        return (x.transpose(0, 1) if self.swapped else x).flatten(0, 1)

    def back(self, flat, shape):
        if not self.swapped:
            return flat.view(shape)
        return flat.view(shape[1], shape[0], -1).transpose(0, 1)


class PlainProduct(torch.autograd.Function):
    """Y = X (S W)^T, of S-STE X (b S(W))^T, with the baseline's backward."""

    @staticmethod
    def forward(ctx, x, weight, linear):
        soft = linear.masking and linear.method == "sste"
        pruned = linear.scale * soft_threshold(weight) if soft else weight * linear.mask()
        ctx.save_for_backward(x, pruned)
        ctx.linear, ctx.micro_batch = linear, linear.rng_state and linear.rng_state.micro_batch
        return x @ pruned.t()

    @staticmethod
    def backward(ctx, dy):
        x, masked = ctx.saved_tensors
        linear = ctx.linear
        order = linear.order
        if linear.masking and linear.method == "extended-srste":
            groups = order.flat(dy).t().unflatten(-1, (-1, 4))
            dy = order.back((groups * largest(groups, 2)).flatten(-2).t(), dy.shape)
        dx = dy @ masked
        if linear.masking and linear.method in ("fst", "sste"):
            dy = order.back(linear.estimate(order.flat(dy), ctx.micro_batch), dy.shape)
        return dx, dy.flatten(0, -2).t() @ x.flatten(0, -2), None


class PlainLinear(torch.nn.Module):
    """Takes the place of a Megatron linear that is not cut; keeps its parameters."""

    def __init__(self, stock, slope, estimate, rng_state):
        super().__init__()
        self.weight, self.bias, self.skip_bias_add = stock.weight, stock.bias, stock.skip_bias_add
        self.method, self.order = slope.method, TokenOrder(slope.token_groups)
        self.estimate, self.rng_state, self.masking, self.found = estimate, rng_state, True, None

    def mask(self):
        weight = self.weight.detach()
        if not self.masking:
            return torch.ones_like(weight)
        return self.found if self.method == "fst" else magnitude_mask(weight)

    def freeze_scale(self):
        weight = self.weight.detach().double()
        pruned = soft_threshold(weight)
        self.scale = float((weight * pruned).sum() / (pruned * pruned).sum())

    def search(self):
        self.found = transposable_mask(self.weight.detach())

    def forward(self, x):
        y = PlainProduct.apply(x, self.weight, self)
        if self.skip_bias_add:
            return y, self.bias
        return y + self.bias, None


def plain_training(config):
    """A baseline in a dense model of one process: losses and gradient norms, and the final weights and masks."""
    from slope_megatron.models.layer_spec import block_linears, sparse_linears
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.optim.optimizer import parameter_groups

    slope, settings, steps = config.slope, config.optimizer, config.train.steps
    dense = dataclasses.replace(config, slope=dataclasses.replace(slope, enabled=False))
    model = build_model(dense, VOCABULARY, torch.float32)
    place = type("Place", (), {"step": 0, "micro_batch": 0})()
    linears = []
    for layer in model.decoder.layers:
        for name, stock in block_linears(layer).items():
            if name in sparse_linears(slope, layer.layer_number - 1):
                part = "mlp" if "fc" in name else "self_attention"
                canonical = f"decoder.layers.{layer.layer_number - 1}.{part}.{name}.weight"
                linear = PlainLinear(stock, slope, estimate_of(canonical, config, place), place)
                setattr(getattr(layer, part), name, linear)
                linears.append(linear)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, dense), betas=(settings.beta1, settings.beta2), eps=settings.eps
    )
    results = []
    sparse = slope.sparse_steps(steps)
    for step in range(steps):
        place.step = step
        for linear in linears:
            linear.masking = step in sparse
            if slope.method == "fst" and (step % slope.fst_mask_interval == 0 or step == sparse.start):
                linear.search()
            if step == sparse.start:
                linear.freeze_scale()
        batches = step_batches(config, step, 0, 1)
        optimizer.zero_grad()
        total = 0.0
        for place.micro_batch, batch in enumerate(batches):
            # Every token counts: the mean of the micro-batches' means is the mean.
            loss = next(parts_of_loss(config, model, [batch])) / len(batches)
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad))
        for linear in linears:
            linear.weight.grad += slope.decay * linear.weight.detach() * ~linear.mask().bool()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step, steps)
        optimizer.step()
        results.append((total, norm))
    weights = [linear.weight.detach().clone() for linear in linears]
    return results, weights, [linear.mask() for linear in linears]


def estimate_of(name, config, place):
    """dY and micro-batch -> its estimate, with words asked for one by one at their place."""
    from slope_megatron.sparsity import counter, mvue_rng
    from slope_megatron.sparsity.mvue import mvue

    def estimate(dy_TN, micro_batch):
        tokens, out = dy_TN.shape
        key = counter.key_of(config.train.seed, f"mvue:{place.step}:{micro_batch}")
        index = torch.arange(out * (tokens // 4))
        blocks = counter.philox(key, index // 4, counter.key_of(config.train.seed, name), mvue_rng.ROUNDS)
        words = blocks[torch.arange(len(index)), index % 4]
        return mvue(dy_TN.t(), words.view(out, -1), 2, 4).t()

    return estimate
