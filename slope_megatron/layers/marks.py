"""Marks on parameters: attributes by which Megatron, DeepSpeed and this project know what a parameter is."""

import torch


def mark(parameter: torch.nn.Parameter, **marks: object) -> None:
    """Set attributes such as Megatron's `sequence_parallel` or DeepSpeed's `ds_pipe_replicated`."""
    for name, value in marks.items():
        setattr(parameter, name, value)


def gradient_sum(weight: torch.Tensor) -> torch.Tensor | None:
    """The fp32 sum that a backward adds this weight's gradient to; None: autograd gets it, for a hook perhaps."""
    return None if weight._backward_hooks else getattr(weight, "gradient_sum", None)
