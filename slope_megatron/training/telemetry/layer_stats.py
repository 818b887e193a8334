"""Figures of each weight matrix, on demand: gradient norm, drift from the start, energy lost to the second pruning.

    grad_norm    Euclidean norm of the step's gradient before clipping, over the replicas' mean and all shards
    drift        ||W - W0|| / ||W0||, W0 being the weights at the first step, measured on SAMPLES elements of each shard
                 spread evenly (all of a smaller one): a standard error of about 1 %, for 16 KiB a shard, not a copy;
                 left out where W0 is zero (adapters), and once a packed run has changed its form
    energy_lost  share of sum w^2 that the second pruning drops; sparse linears only

Gradient norms cost one more sum of the gradients over the replicas in the steps that are looked at, nothing in others.
"""

from typing import TypeAlias

import torch
from deepspeed.utils import safe_get_full_grad
from megatron.core import parallel_state

from slope_megatron.models.canonical import sharded_state_dict
from slope_megatron.models.layer_spec import sparse_modules
from slope_megatron.training.engine import Engine
from slope_megatron.training.optim.optimizer import model_parameters
from slope_megatron.training.parallel import is_counted_here
from slope_megatron.training.together import from_every_rank
from slope_megatron.training.zero import partitions

# A prime: with a power of two, even spreading would meet few columns only.
SAMPLES = 4093
# Of each matrix by the model's own name.
Samples: TypeAlias = dict[str, torch.Tensor]


def matrices(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Weight matrices by the model's own name; tied copies once."""
    named = model_parameters(model)
    return {
        name: parameter
        for name, parameter in named
        if len(partitions.shape_of(parameter)) == 2 and not getattr(parameter, "ds_pipe_replicated", False)
    }


def sample(weight: torch.Tensor) -> torch.Tensor:
    """Elements spread evenly over a matrix, in float32, on the CPU."""
    flat = weight.detach().flatten()
    count = min(SAMPLES, flat.numel())
    indices = torch.arange(count, device=flat.device) * flat.numel() // count
    return flat[indices].float().cpu()


def sample_all(model: torch.nn.Module) -> Samples:
    """Samples of all matrices; taken of the initial weights, before any checkpoint is loaded."""
    return {name: sample(parameter) for name, parameter in matrices(model).items()}


class LayerStats:
    """Gathers the figures in steps that are multiples of `--layer-stats-interval`.

    Args:
        start: `sample_all` of the initial weights.
    """

    def __init__(self, engine: Engine, start: Samples):
        self.engine, self.start = engine, start
        self.names = canonical_names(engine.model)
        self.squares: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the step numbered `step`, counted from 1, is looked at."""
        return step % self.engine.config.watch.layer_stats_interval == 0

    def note_gradients(self) -> None:
        """Between reduction and update; collective over the replicas."""
        self.squares = {}
        for name, parameter in matrices(self.engine.model).items():
            gradient = safe_get_full_grad(parameter)
            norm = 0.0 if gradient is None else float(gradient.double().norm()) / self.engine.loss_scale
            self.squares[name] = norm**2

    def collect(self) -> dict[str, dict[str, float]]:
        """The figures by canonical name, on every rank; call after the update, on all ranks."""
        energies = {id(module.weight): module for module in sparse_modules(self.engine.model)}
        rows = {}
        for name, parameter in matrices(self.engine.model).items():
            with partitions.gathered(parameter):
                now = sample(parameter)
                module = energies.get(id(parameter))
                pruning = module.double_pruning() if module else None
            start = self.start.get(name, torch.zeros_like(now))
            row = [self.squares.get(name, 0.0), float((now - start).square().sum()), float(start.square().sum())]
            row += [1.0, pruning.energy, pruning.energy_dropped] if pruning else [0.0, 0.0, 0.0]
            # What is replicated is counted once.
            rows[self.names[name]] = row if is_counted_here(parameter) else [0.0] * len(row)
        return merge(rows)


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """The checkpoint's name of each parameter, with the global layer number."""
    with partitions.whole_shapes(model):
        return {name: getattr(entry, "key", name) for name, entry in sharded_state_dict(model).items()}


def merge(rows: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Add up the shards of each matrix over the ranks that share the model, and turn sums into figures."""
    sums: dict[str, list[float]] = {}
    for part in from_every_rank(rows, parallel_state.get_model_parallel_group()):
        for name, row in part.items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(row)), row, strict=True)]
    figures = {}
    for name, (gradient, moved, start, sparse, energy, dropped) in sums.items():
        figures[name] = {"grad_norm": gradient**0.5}
        if start:
            figures[name]["drift"] = (moved / start) ** 0.5
        if sparse:
            figures[name]["energy_lost"] = dropped / energy if energy else 0.0
    return figures
