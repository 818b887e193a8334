"""The row pattern of each linear that is about to be pruned: random, by magnitude, or Wanda's. N out, K in."""

from collections.abc import Callable

import torch

from slope_megatron.config import SlopeConfig
from slope_megatron.sparsity import counter
from slope_megatron.sparsity.pattern import magnitude_pattern, random_pattern
from slope_megatron.sparsity.wanda import squared_norms, wanda_mask
from slope_megatron.torch_layers.select import weight_of

Calibrate = Callable[[torch.nn.Module], object]


def row_mask(name: str, linear: torch.nn.Module, slope: SlopeConfig, seed: int, norms: dict) -> torch.Tensor:
    """bool `[N, K]`; a random one depends on seed and name alone, the same on every rank."""
    weight_NK = weight_of(linear).detach()
    if slope.pattern == "wanda":
        return wanda_mask(weight_NK, norms[name], slope.n, slope.m)
    if slope.pattern == "magnitude":
        return magnitude_pattern(weight_NK, slope.n, slope.m)
    rows, columns = weight_NK.shape
    key = counter.key_of(seed, f"{name}.weight_pattern")
    return random_pattern(counter.bits(key, range(rows), range(columns), columns, weight_NK.device), slope.n, slope.m)


@torch.no_grad()
def input_norms(model: torch.nn.Module, linears: dict[str, torch.nn.Module], calibrate: Calibrate) -> dict:
    """Each linear's sum of squared inputs over all that `calibrate(model)` runs through the dense model: fp64 `[K]`.

    Raises:
        ValueError: a linear has seen nothing.
    """
    sums: dict[str, torch.Tensor] = {}

    def measure(name: str):
        def hook(_module, arguments):
            here = squared_norms(arguments[0].flatten(0, -2))
            sums[name] = sums[name] + here if name in sums else here

        return hook

    hooks = [linear.register_forward_pre_hook(measure(name)) for name, linear in linears.items()]
    training = model.training
    try:
        calibrate(model.eval())
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if unseen := [name for name in linears if name not in sums]:
        raise ValueError(
            f"calibrate(model) has run nothing through {unseen[0]}: call the model on samples that reach every linear "
            "to be pruned, or name this one in skip"
        )
    return sums
