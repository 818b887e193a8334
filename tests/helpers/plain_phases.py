"""SLoPe with a dense start and a dense tail in plain torch: dense matrices, masks, AdamW; no packing, no engine.

A pruned place has no weight, no gradient and no moments, so AdamW leaves it alone: the packed form in dense matrices.
"""

import torch

from helpers.models import VOCABULARY, step_batches
from helpers.plain_baselines import largest
from helpers.plain_training import parts_of_loss


class Product(torch.autograd.Function):
    """Y = X (S W)^T, dX = dY (S2 S W), dW = S (dY^T X); S and S2 all ones where the step is dense."""

    @staticmethod
    def forward(ctx, x, weight, linear):
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        return x @ (weight * linear.row).t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        row, both = ctx.linear.row, ctx.linear.row * ctx.linear.column
        return dy @ (weight * both), dy.flatten(0, -2).t() @ x.flatten(0, -2) * row, None


class Linear(torch.nn.Module):
    """Takes the place of a Megatron linear that is not cut; keeps its parameters."""

    def __init__(self, stock):
        super().__init__()
        self.weight, self.bias, self.skip_bias_add = stock.weight, stock.bias, stock.skip_bias_add
        self.row = self.column = torch.ones_like(stock.weight)

    def prune_columns(self):
        """Of the kept weights, the two largest of every four of a column; a kept zero before a pruned place."""
        scores = torch.where(self.row > 0, self.weight.detach().abs().double() + 1, 0.0)
        self.column = largest(scores.t().unflatten(-1, (-1, 4)), 2).flatten(-2).t().float()

    def forward(self, x):
        y = Product.apply(x, self.weight, self)
        if self.skip_bias_add:
            return y, self.bias
        return (y if self.bias is None else y + self.bias), None


def replaced(model, slope):
    """The model's linears that are to be pruned, each one a `Linear` from here on."""
    from slope_megatron.models.layer_spec import linears_to_prune

    made = {id(linear): Linear(linear) for linear, _ in linears_to_prune(model, slope)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in made:
                setattr(parent, name, made[id(child)])
    return list(made.values())


def start_sparse(linears, config):
    """The weights and patterns that the packed model begins with."""
    from slope_megatron.models.layer_spec import linears_to_prune
    from slope_megatron.models.provider import build_model

    model = build_model(config, VOCABULARY, torch.float32)
    for linear, (packed, _) in zip(linears, linears_to_prune(model, config.slope), strict=True):
        linear.row = packed.row_pattern().float()
        linear.weight.data.copy_(packed.dense_weight())


def grow(linear, state):
    """Every place trains: the new ones are 0, with the mean second moment of their group's kept places."""
    moments, kept = state["exp_avg_sq"].unflatten(-1, (-1, 4)), linear.row.unflatten(-1, (-1, 4))
    mean = (moments * kept).sum(-1, keepdim=True) / 2
    moments.copy_(torch.where(kept > 0, moments, mean))
    linear.row = linear.column = torch.ones_like(linear.row)


def prune(linear, state):
    """The two largest of every four stay."""
    linear.row = largest(linear.weight.detach().unflatten(-1, (-1, 4)), 2).flatten(-2).float()
    for tensor in (linear.weight.data, state["exp_avg"], state["exp_avg_sq"]):
        tensor.mul_(linear.row)
    linear.prune_columns()


def plain_phases(config):
    """Losses and gradient norms, and the pruned matrices with their moments at the end."""
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.optim.optimizer import parameter_groups

    slope, settings, steps = config.slope, config.optimizer, config.train.steps
    sparse = slope.sparse_steps(steps)
    model = build_model(config.dense_twin, VOCABULARY, torch.float32)
    groups = parameter_groups(model, config.dense_twin)
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    linears, results = replaced(model, slope), []
    if 0 in sparse:
        start_sparse(linears, config)
        for linear in linears:
            linear.prune_columns()
    for step in range(steps):
        for linear in linears:
            if step == sparse.start > 0:
                prune(linear, optimizer.state[linear.weight])
            if step == sparse.stop:
                grow(linear, optimizer.state[linear.weight])
        optimizer.zero_grad()
        total = 0.0
        for loss in parts_of_loss(config, model, step_batches(config, step, 0, 1)):
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step, steps)
        optimizer.step()
        if step in sparse and (step + 1) % slope.backward_mask_interval == 0:
            for linear in linears:
                linear.prune_columns()
        results.append((total, norm))
    kinds = ("exp_avg", "exp_avg_sq")
    states = [{kind: optimizer.state[one.weight][kind] for kind in kinds} for one in linears]
    return results, [{"weight": one.weight.detach(), **state} for one, state in zip(linears, states, strict=True)]
