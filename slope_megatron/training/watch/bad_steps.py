"""Steps that went wrong: losses and gradients that are not finite, and losses that jump.

A step whose loss or gradients are not finite on any rank updates nothing on all of them (`skipping`); it counts as a
step, and the data moves on. The state stays that of the last good step.
"""

import collections
import logging
import statistics

from slope_megatron.config import WatchConfig
from slope_megatron.training.engine import StepResult
from slope_megatron.training.together import Agreed

logger = logging.getLogger(__name__)
WINDOW = 64
# Losses needed before a jump can be told from the ordinary.
ENOUGH = 16
# The standard deviation of normal numbers over their median absolute deviation.
DEVIATION_OF_MAD = 1.4826


class Diverged(Agreed):
    """Too many bad steps in a row."""


class StepWatch:
    """Looks at every step of one run; all ranks count the same bad steps, since they decide on each together.

    Args:
        samples: samples of one step, which follow each other from step to step.
    """

    def __init__(self, settings: WatchConfig, samples: int):
        self.settings, self.samples = settings, samples
        self.bad_steps = 0
        self.bad_in_a_row = 0
        self.losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def look(self, result: StepResult, step: int) -> dict:
        """Check the step that ended, counted from 1; returns what there is to say of it, for the metrics.

        Raises:
            Diverged: it was the last bad step in a row that is allowed.
        """
        first = (step - 1) * self.samples
        span = [first, first + self.samples - 1]
        if result.bad:
            self.bad_steps += 1
            self.bad_in_a_row += 1
            logger.warning(
                "step %d: loss %g, gradient norm %g; nothing was updated (bad step %d in a row); samples %d to %d",
                *(step, result.loss, result.grad_norm, self.bad_in_a_row, *span),
            )
            if self.bad_in_a_row >= self.settings.max_bad_steps:
                raise Diverged(
                    f"{self.bad_in_a_row} steps in a row had a loss or gradients that are not finite (--max-bad-steps)"
                    f", the last with samples {span[0]} to {span[1]}: the run stops"
                )
            return {"bad": True, "samples": span}
        self.bad_in_a_row = 0
        usual = self.usual_loss(result.loss)
        if usual is None:
            return {}
        logger.warning(
            "step %d: loss %.4f jumped from a median of %.4f; samples %d to %d", step, result.loss, usual, *span
        )
        return {"spike": True, "median_loss": usual, "samples": span}

    def usual_loss(self, loss: float) -> float | None:
        """The median of the losses before, if `loss` jumped above it; then it is one of them."""
        factor, before = self.settings.spike_factor, list(self.losses)
        self.losses.append(loss)
        if not factor or len(before) < ENOUGH:
            return None
        median = statistics.median(before)
        deviation = DEVIATION_OF_MAD * statistics.median(abs(value - median) for value in before)
        return median if loss > median + factor * max(deviation, 1e-3 * abs(median)) else None
