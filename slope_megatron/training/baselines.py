"""The decay of pruned weights in the masked baselines."""

import torch

from slope_megatron.layers.masked_weight import MaskedWeight
from slope_megatron.layers.masks import add_decay_
from slope_megatron.models.layer_spec import masked_modules
from slope_megatron.training.zero import partitions


def add_decay(model: torch.nn.Module, optimizer, sparse_group: str) -> None:
    """Add lambda (1 - S) W to each masked weight's gradient: after clipping, right before the optimizer's update.

    In the gradient, as FST does (arXiv 2404.01847) and Extended SR-STE takes from it, so that Adam normalises it with
    the rest; SR-STE's own form, W -= lr lambda (1 - S) W, is SGD's. Once a step, whatever the number of micro-batches
    and replicas, and outside the gradient's norm. W and the gradient are ZeRO's fp32 partitions, of which this rank
    has a part.

    Args:
        optimizer: DeepSpeed's, of ZeRO stage 1 or 2; the fp32 partitions are its base optimizer's parameters.
        sparse_group: the parameter group that the masked weights are in.
    """
    modules = [module for module in masked_modules(model) if module.slope.decay]

    def hook(base, _arguments, _keywords) -> None:
        for group in base.param_groups:
            if group["name"] == sparse_group:
                for module in modules:
                    decay_partition(module, group["params"][0])

    if modules:
        optimizer.optimizer.register_step_pre_hook(hook)


@torch.no_grad()
def decay_partition(module: MaskedWeight, partition: torch.Tensor) -> None:
    """The decay of one weight, for the part of it that lies in this rank's flat fp32 partition."""
    mapping = partitions.mapping_of(module.weight)
    if mapping is None or partition.grad is None:
        return
    part, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    weight = partition.narrow(0, flat.start, flat.numel)
    gradient = partition.grad.narrow(0, flat.start, flat.numel)
    add_decay_(gradient, weight, module.weight_mask.to(partition.device), part.start, module.slope.decay)
