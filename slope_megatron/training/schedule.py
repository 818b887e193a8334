"""What changes from step to step, as functions of the step: learning rates, the adapters' entry, the column pattern."""

import dataclasses

from slope_megatron.config import Config
from slope_megatron.training.optim.optimizer import ADAPTERS, EMBEDDINGS, density_of, is_sparse


@dataclasses.dataclass(frozen=True)
class Phases:
    """The schedule of one run; steps are counted from 0."""

    config: Config

    def adapters_on(self, step: int) -> bool:
        """Whether the adapters take part in step `step`."""
        start = self.config.adapter_start
        return start is not None and step >= start

    def adapters_join(self, step: int) -> bool:
        """Whether `step` is the adapters' first."""
        return self.config.adapter_start == step

    def new_column_pattern(self, steps_done: int) -> bool:
        """Whether the second pruning is chosen anew once `steps_done` steps are done (DESIGN: interval)."""
        interval = self.config.slope.backward_mask_interval
        return self.config.slope.enabled and interval > 0 and steps_done % interval == 0

    def new_mask(self, steps_done: int) -> bool:
        """Whether a baseline chooses its masks anew once `steps_done` steps are done; swaps are no choice."""
        baseline = self.config.slope.baseline
        if baseline and baseline.swaps:
            return False
        return steps_done % self.config.slope.mask_interval == 0

    def learning_rate(self, step: int, group: str) -> float:
        """The learning rate of one parameter group in step `step`."""
        base = self.config.optimizer.lr_at(step, self.config.train.steps)
        slope = self.config.slope
        if is_sparse(group) and slope.enabled:
            return base * slope.lr_multiplier / density_of(group)
        if group == EMBEDDINGS:
            return base * self.config.optimizer.embedding_lr_multiplier
        if group == ADAPTERS:
            return base * slope.adapter_lr_multiplier if self.adapters_on(step) else 0.0
        return base
