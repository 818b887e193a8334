"""Dense controls: the model narrowed until it costs what a 2:4 method costs.

A control answers whether one gets as much by a smaller dense model. It is equal to the method in one of

    flops         FLOPs of a training step = those of the dense model / the method's speed-up of a whole model, averaged
                  over its sparse and dense steps
    state_bytes   weights, patterns, operands, gradients and optimizer of one GPU in bf16
    parameters    parameters in the blocks, averaged over the steps (arXiv 2501.12486: loss follows that average)

Depth and heads stay; the hidden size takes multiples of 8 a head, and the MLP's width those of 16.
"""

import dataclasses
from collections.abc import Callable

from slope_megatron.config import Config, ModelConfig
from slope_megatron.models.counts import Counts, count, model_tensors
from slope_megatron.models.shapes import FIRST, LAST
from slope_megatron.planner import memory
from slope_megatron.training.telemetry.flops import flops_per_token

HEAD_UNIT, FFN_UNIT = 8, 16
# Of the target. Of the widths within it, the one whose MLP has most nearly the model's own proportion is taken.
TOLERANCE = 0.01


def step_flops(config: Config, vocabulary: int) -> float:
    """FLOPs of one token, forward and backward, as a dense model."""
    return flops_per_token(config, vocabulary).dense_equivalent


def training_bytes(config: Config, vocabulary: int) -> float:
    """State on one GPU that trains in bf16 with fp32 gradients on sparse kernels, as the planner counts it.

    Of the form that holds most, where a dense start or tail trains another one.
    """
    bytes_of = memory.precision("bf16", "fp32", config.slope.fp8 != "off")
    counts = (count(model_tensors(config.form_at(step), vocabulary), 1) for step in (0, *config.switches))
    return max(sum(memory.state_bytes(one, bytes_of, "kernels").values()) for one in counts)


def body_parameters(config: Config, vocabulary: int) -> int:
    """Trained parameters of the blocks: without embeddings, output layer and the last norm."""
    return body_counts(config, vocabulary).trained


def average_parameters(config: Config, vocabulary: int) -> float:
    """Parameters of the blocks that are multiplied, averaged over the steps.

    Of N:M weights only the kept ones count, also where a dense master is trained; all in dense steps. Adapters count
    from the step on at which they join.
    """
    counts, sparse = body_counts(config, vocabulary), sparse_share(config)
    kept = counts.packed + counts.masked * config.slope.n / config.slope.m
    whole = counts.packed_dense + counts.masked
    start = config.adapter_start
    with_adapters = 0.0 if start is None else 1.0 - start / config.train.steps
    return sparse * kept + (1.0 - sparse) * whole + counts.other + with_adapters * counts.adapters


def sparse_share(config: Config) -> float:
    """The share of the steps that multiply pruned weights; 1 for a dense run, which has no other steps."""
    steps = config.train.steps
    return len(config.slope.sparse_steps(steps)) / steps if config.slope.enabled else 1.0


def speedup_of_run(config: Config, gain: float) -> float:
    """Of a whole run whose sparse steps are `gain` times as fast as dense ones; its dense steps gain nothing."""
    share = sparse_share(config)
    return 1.0 / (share / gain + 1.0 - share)


def body_counts(config: Config, vocabulary: int) -> Counts:
    return count((one for one in model_tensors(config, vocabulary) if one.block not in (FIRST, LAST)), 1)


COSTS: dict[str, Callable[[Config, int], float]] = {
    "flops": step_flops,
    "state_bytes": training_bytes,
    "parameters": average_parameters,
}


def narrowed(config: Config, vocabulary: int, to: str, target: float) -> ModelConfig:
    """The architecture of a dense configuration, narrower, at a cost within TOLERANCE of the target.

    Args:
        to: what it costs, a name of COSTS.
    Raises:
        ValueError: the target is more than the model itself costs, or no width comes near it.
    """
    cost, model = COSTS[to], config.model
    if target > cost(config, vocabulary) * (1 + TOLERANCE):
        raise ValueError(
            f"a dense control of {target:.4g} {to} is wider than the dense model of {cost(config, vocabulary):.4g}: "
            "controls only narrow; give a speed-up of 1 or more, or another method"
        )
    found: list[tuple[float, float, ModelConfig]] = []
    step = HEAD_UNIT * model.num_attention_heads
    for hidden in range(step, model.hidden_size + 1, step):

        def at(ffn: int, hidden: int = hidden) -> tuple[float, ModelConfig]:
            narrow = dataclasses.replace(model, hidden_size=hidden, ffn_hidden_size=ffn)
            return cost(dataclasses.replace(config, model=narrow), vocabulary), narrow

        # A cost is linear in the MLP's width: two points tell the width at which it meets the target.
        (first, _), (second, _) = at(FFN_UNIT), at(2 * FFN_UNIT)
        units = max(1, round(1 + (target - first) / (second - first)))
        reached, narrow = at(units * FFN_UNIT)
        if abs(reached / target - 1.0) <= TOLERANCE:
            proportion = narrow.ffn / narrow.hidden_size / (model.ffn / model.hidden_size)
            found.append((max(proportion, 1 / proportion), abs(reached / target - 1.0), narrow))
    if not found:
        raise ValueError(
            f"no dense model of {model.num_layers} blocks and {model.num_attention_heads} heads comes within "
            f"{TOLERANCE:.0%} of {target:.4g} {to}: take a larger size"
        )
    return min(found, key=lambda entry: entry[:2])[2]
