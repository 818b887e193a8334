"""Dynamic patterns, simulated on dense weights: whether they pay is to be known before they are built packed.

A step of `--slope-method rigl`, on one rank:

    gradients   pruned places lose theirs, so that neither the norm nor a moment knows of them; every
                --slope-swap-interval steps the dense one is read before, which says what is to grow
    update      swaps (`sparsity.swaps`), in masks, masters and moments, unless the step is skipped
"""

import torch
import torch.distributed as dist

from slope_megatron.models.layer_spec import masked_modules
from slope_megatron.sparsity import counter, swaps
from slope_megatron.sparsity.packing import pack_bits
from slope_megatron.training.optim import optimizer as optim
from slope_megatron.training.zero import gradients, partitions


class PatternSwaps:
    """An observer of an engine (`Engine.observers`).

    Raises:
        ValueError: there are several ranks.
    """

    def __init__(self, engine):
        if dist.get_world_size() > 1:
            raise ValueError(
                f"--slope-method rigl on {dist.get_world_size()} ranks: it is a simulation for studies; start one rank"
            )
        self.engine = engine
        self.modules = list(masked_modules(engine.model))
        self.pending: list[swaps.Swaps] = []

    def __call__(self, part: str) -> None:
        if part == "gradients":
            self.mask_gradients()
        if part == "update" and self.pending and not self.engine.skipping.skips:
            for module, chosen in zip(self.modules, self.pending, strict=True):
                self.apply(module, chosen)

    def share(self) -> float:
        """Of the groups, in the present step."""
        slope, step, steps = self.engine.config.slope, self.engine.steps_done, self.engine.config.train.steps
        due = step > 0 and step % slope.swap_interval == 0
        return swaps.share_at(step, steps, slope.swap_share) if due else 0.0

    @torch.no_grad()
    def mask_gradients(self) -> None:
        share, self.pending = self.share(), []
        for number, module in enumerate(self.modules):
            gradient, mask = gradients.gradient(module.weight), module.mask()
            assert gradient is not None
            gradient = gradient.view_as(mask)
            if share:
                self.pending.append(self.choose(number, module, mask, gradient, share))
            gradient.mul_(mask)

    def choose(self, number: int, module, mask: torch.Tensor, gradient: torch.Tensor, share: float) -> swaps.Swaps:
        config = self.engine.config
        word, _ = counter.key_of(config.train.seed, f"swaps:{self.engine.steps_done}:{number}")
        generator = torch.Generator().manual_seed(word)
        return swaps.choose_swaps(
            module.weight, mask, gradient, module.slope.m, share, config.slope.swap_rule, generator
        )

    @torch.no_grad()
    def apply(self, module, chosen: swaps.Swaps) -> None:
        """Masters hold the whole weight: there is one rank."""
        masters = next(
            part.masters for part in partitions.of(self.engine.optimizer) if part.group["name"] == optim.SPARSE
        )
        state = self.engine.optimizer.optimizer.state[masters]
        address = partitions.mapping_of(module.weight).hp_fragment_address
        tensors = (masters, *(state[name] for name in partitions.MOMENTS))
        swaps.swap_state(chosen, *(tensor.narrow(0, address.start, address.numel) for tensor in tensors))
        module.write_mask(pack_bits(swaps.swap_mask(module.mask(), chosen)))
