"""Kernels under Megatron-LM are chosen once for the ranks that multiply alike, and kept beside the checkpoints.

As in `slope pretrain`, by `training.kernel_choices`; on products of experts' shapes each rank decides for itself.
Imported where the script is hooked: the upstream's own megatron.core is the one that counts.
"""

import functools
from pathlib import Path

from slope_megatron.integrations.megatron_lm import plugin
from slope_megatron.models.layer_spec import sparse_modules
from slope_megatron.training import kernel_choices


def with_common_choices(setup_model_and_optimizer):
    """The model; ranks of a stage then choose kernels as one, beginning with the choices of the run that is loaded."""

    @functools.wraps(setup_model_and_optimizer)
    def setup(*positional, **keywords):
        result = setup_model_and_optimizer(*positional, **keywords)
        args, slope = plugin.settings()
        if slope.enabled:
            folder, own = Path(args.load or ""), expert_shapes(result[0])
            kernel_choices.share(folder, resumed=bool(args.load), hinted=True, own=own)
        return result

    return setup


def expert_shapes(chunks) -> set[tuple[int, int]]:
    """(N, K) of this rank's packed weights of experts."""
    packed = (module for chunk in chunks for module in sparse_modules(chunk) if getattr(module, "is_expert", False))
    return {(module.weight.shape[0], module.weight_pattern.shape[1] * 8) for module in packed}


def with_saved_choices(save_checkpoint):
    """The checkpoint, and this stage's choices of kernels in its folder."""

    @functools.wraps(save_checkpoint)
    def save(*positional, **keywords):
        result = save_checkpoint(*positional, **keywords)
        args, slope = plugin.settings()
        if slope.enabled and args.save:
            kernel_choices.save(Path(args.save))
        return result

    return save
