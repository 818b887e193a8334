"""`--slope-pattern wanda`: the patterns of a sparse model from a dense one and some training samples."""

import torch

from slope_megatron.config import Config
from slope_megatron.data.batches import MicroBatches
from slope_megatron.models.dense import load_dense
from slope_megatron.models.provider import build_bare_model, to_own_device
from slope_megatron.models.wanda import prune_in_place
from slope_megatron.training.objectives import OBJECTIVES


def check(config: Config, samples: int) -> None:
    """Refuse what cannot be calibrated.

    Args:
        samples: in the training dataset.
    Raises:
        ValueError: the model is cut into stages, or there are too few samples.
    """
    if config.slope.pattern != "wanda" or not config.slope.packed:
        return
    if config.parallel.pipeline_parallel > 1:
        raise ValueError(
            f"--slope-pattern wanda with --pipeline-parallel {config.parallel.pipeline_parallel}: its blocks are "
            "measured one after the other on the same ranks; prune with --pipeline-parallel 1 --stop-at 0, then "
            "--resume at any layout"
        )
    if samples < config.slope.wanda_samples:
        raise ValueError(
            f"--slope-wanda-samples is {config.slope.wanda_samples} and the run has {samples} training samples "
            "(--steps x --global-batch-size): ask for fewer"
        )


def calibrated_masks(config: Config, tokenizer_size: int, dtype: torch.dtype, source, dataset) -> dict:
    """{weight's name in the model: bool `[N, K]` of this rank}, measured on the first training samples, one at a time.

    Args:
        source: the dense weights, as `load_dense` takes them.
    """
    dense = config.dense_twin
    model = to_own_device(build_bare_model(dense, tokenizer_size, dtype))
    load_dense(model, dense, source)
    device = next(model.parameters()).device
    objective = OBJECTIVES[config.model.architecture]

    def call(model, batch):
        return objective.forward(model, {name: tensor.to(device) for name, tensor in batch.items()})

    # The same samples on every replica: no sums over replicas, whose order could differ.
    batches = MicroBatches(dataset, config.slope.wanda_samples, 1, 0, 1).step(0)
    return prune_in_place(model, config.slope, batches, call)
