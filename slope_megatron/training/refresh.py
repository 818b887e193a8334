"""After each update: operands follow the weights' values, and patterns and masks when their step has come."""

import logging

import torch

from slope_megatron.layers.pruned_linear import PrunedLinear
from slope_megatron.models.layer_spec import masked_modules, sparse_modules
from slope_megatron.training.cuda_graphs import Graphs, Replayed
from slope_megatron.training.objectives import Batch
from slope_megatron.training.schedule import Phases
from slope_megatron.training.zero import partitions

logger = logging.getLogger(__name__)


class Refresh:
    """Of one engine's model; called after the weights' gather.

    A refresh is a few small kernels for each linear: asked for from Python they took a GPU with little else to do up to
    5 % of a step. So they are captured where micro-batches are.

    Args:
        graphs: None: everything runs eagerly.
    """

    def __init__(self, model: torch.nn.Module, phases: Phases, graphs: Graphs | None):
        self.model, self.phases, self.graphs = model, phases, graphs
        self.replayed: Replayed | None = None

    def __call__(self, steps_done: int) -> None:
        following: list[PrunedLinear] = []
        choose, mask = self.phases.new_column_pattern(steps_done), self.phases.new_mask(steps_done)
        for packed in sparse_modules(self.model):
            if choose:
                with partitions.gathered(packed.weight):
                    packed.update_column_pattern()
            elif packed.has_operands:
                following.append(packed)
        for masked in masked_modules(self.model):
            if mask:
                masked.update_mask()
            else:
                following.append(masked)
        self.follow(following)

    def follow(self, following: list[PrunedLinear]) -> None:
        """Bring the operands of these up to the present values."""
        graphs = self.graphs
        if graphs and following and all(module.can_follow for module in following):
            if self.replayed is None:
                self.replayed = graphs.function(self.values, "the refresh of operands", collective=False)
            try:
                self.replayed.begin([{}], modules=following)
                # Not before the micro-batches, whose next eager step would have to take its memory anew.
                self.replayed.replaying &= graphs.any_captured
                self.replayed({}, following)
            except RuntimeError as error:
                logger.warning("CUDA graphs: %s; operands are refreshed eagerly, one by one", error)
                graphs.drop()
                graphs.functions.remove(self.replayed)
                self.graphs = None
            else:
                for module in following:
                    module.mark_followed()
                return
        for module in following:
            with partitions.gathered(module.weight):
                module.refresh()

    def values(self, _nothing: Batch, following: list[PrunedLinear]) -> torch.Tensor:
        """What the GPU has to do of it; a graph repeats this and no more. A tensor that says nothing."""
        for module in following:
            module.follow_values()
        return torch.zeros((), device=following[0].weight.device)
