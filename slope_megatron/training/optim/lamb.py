"""LAMB (You et al. 2020, algorithm 2) over the flat partitions that ZeRO hands an optimizer.

For each parameter w with gradient g, at its t-th update:

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w
    w = w - lr (|w| / |u|) u         the trust ratio |w| / |u| is 1 where a norm is 0

Surprising: the norms are of the whole parameter, of which a partition may hold a piece, several, or a piece of a shard.
So each step sums one vector of squared norms over the ranks that share the parameters, and a parameter that every
tensor-parallel rank holds is counted once. As published, what does not decay (biases, norms) has trust ratio 1.
"""

from collections.abc import Callable
from typing import overload

import torch


class Lamb(torch.optim.Optimizer):
    """LAMB; `attach` tells it where parameters lie in flat partitions, without it each tensor is one parameter.

    State per tensor as AdamW's: `step`, `exp_avg`, `exp_avg_sq`.
    """

    def __init__(self, groups, *, lr: float, betas: tuple[float, float], eps: float, trust_no_decay: bool = False):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.trust_no_decay = trust_no_decay
        self.pieces: dict[int, list[tuple[slice, bool]]] = {}
        self.sum_over_ranks: Callable[[torch.Tensor], None] = lambda squares: None

    def attach(self, pieces: list[tuple[torch.Tensor, list[tuple[slice, bool]]]], sum_over_ranks) -> None:
        """
        Args:
            pieces: of each flat tensor, the slice of every parameter of its group, in the same order on every rank (an
                empty slice where this rank has nothing of it), and whether this rank's piece is counted.
            sum_over_ranks: sums a tensor in place over the ranks that share the parameters.
        """
        self.pieces = {id(flat): own for flat, own in pieces}
        self.sum_over_ranks = sum_over_ranks

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all tensors that have a gradient. Collective where `attach` gave a sum over ranks.

        Args:
            closure: as for every optimizer of torch's: computes the gradients anew and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [
            (group, weights, self.adam_update(group, weights))
            for group in self.param_groups
            for weights in group["params"]
            if weights.grad is not None
        ]
        trusted = [
            (weights, update, self.pieces.get(id(weights), [(slice(None), True)]))
            for group, weights, update in updates
            if group["weight_decay"] or self.trust_no_decay
        ]
        ratios = iter(self.trust_ratios(trusted))
        for _, update, pieces in trusted:
            for where, _ in pieces:
                update[where].mul_(next(ratios))
        for group, weights, update in updates:
            weights.add_(update, alpha=-group["lr"])
        return loss

    def adam_update(self, group: dict, weights: torch.Tensor) -> torch.Tensor:
        """u above, after moving the moments."""
        state = self.state[weights]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weights)
            state["exp_avg_sq"] = torch.zeros_like(weights)
        beta1, beta2 = group["betas"]
        gradient, mean, square = weights.grad, state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        count = float(state["step"])
        mean.lerp_(gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        update = (square / (1.0 - beta2**count)).sqrt_().add_(group["eps"])
        torch.div(mean, update, out=update).div_(1.0 - beta1**count)
        return update.add_(weights, alpha=group["weight_decay"])

    def trust_ratios(self, trusted: list[tuple]) -> torch.Tensor:
        """|w| / |u| of all parameters in turn, in one vector; one sum over ranks for all."""
        squares = [
            torch.stack([tensor[where].norm().square() * counted for tensor in (weights, update)])
            for weights, update, pieces in trusted
            for where, counted in pieces
        ]
        if not squares:
            return torch.ones(0)
        norms = torch.stack(squares)
        self.sum_over_ranks(norms)
        weight, update = norms.sqrt().unbind(1)
        return torch.where((weight > 0) & (update > 0), weight / update, 1.0)
