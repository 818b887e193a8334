"""Gradients between backward and ZeRO's reduction: sums that belong to the model's own layout; and where they lie."""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule

from slope_megatron.layers.marks import mark
from slope_megatron.training.zero import partitions


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The tensor that DeepSpeed will reduce: the fp32 accumulator under bf16, else the ordinary gradient."""
    for name in ("_hp_grad", "grad_accum", "grad"):
        found = getattr(parameter, name, None)
        if found is not None:
            return found
    return None


def held(model: torch.nn.Module, optimizer) -> list[torch.Tensor]:
    """Gradients as they are at stage 1 before the reduction; DeepSpeed's bf16 optimizer keeps room for all of them."""
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return optimizer.fp32_groups_gradients_flat
    return [tensor for tensor in map(gradient, model.parameters()) if tensor is not None]


def held_cut(optimizer) -> list[torch.Tensor]:
    """This rank's part of the reduced gradients, between reduction and update, at any stage.

    With offload DeepSpeed has moved them beside the masters; its bf16 optimizer has a flat buffer of its own.
    """
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        return optimizer.fp32_groups_gradient_flat_partition
    beside = [tensor for partition in partitions.of(optimizer) if (tensor := partition.masters.grad) is not None]
    if beside:
        return beside
    return [tensor for kept in optimizer.averaged_gradients.values() for tensor in kept or ()]


def finite(optimizer) -> torch.Tensor:
    """Whether all gradients that this rank is about to use are finite, between reduction and update: a bool, where they
    are.

    Under offload, of the norms that DeepSpeed took of them on the device: copies may still be on their way, or on disk.
    """
    norms = getattr(optimizer, "norm_for_param_grads", None)
    tensors = held_cut(optimizer) if norms is None else list(norms.values())
    # The largest magnitude hands on what is not a number.
    return torch.nn.utils.get_total_norm(
        [tensor for tensor in tensors if tensor.numel()], norm_type=math.inf
    ).isfinite()


def clear_kept(optimizer) -> None:
    """Forget the gradients of a step that was skipped, where DeepSpeed 0.19 keeps them.

    ZeRO 3            one buffer for all; the next backward overwrites those that take part in it, and no others
    offload           beside the masters; likewise
    offload, ZeRO 1   sums of 16-bit gradients, to which the next backward would add
    and 2
    """
    if partitions.is_stage_3(optimizer):
        optimizer.grad_partitions_flat_buffer.zero_()
    elif hasattr(optimizer, "averaged_gradients"):
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
    for partition in partitions.of(optimizer):
        if partition.masters.grad is not None:
            partition.masters.grad.zero_()


def sum_sequence_parallel(model: torch.nn.Module) -> None:
    """Norms and row biases see this rank's part of the sequence only: sum their gradients over the TP ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    marked = [parameter for parameter in model.parameters() if getattr(parameter, "sequence_parallel", False)]
    tensors = [found for found in map(gradient, marked) if found is not None]
    if not tensors or group.size() == 1:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together, group=group)
    for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def tied_weight(model: LanguageModule) -> torch.nn.Parameter | None:
    """The embedding that is also the output layer's weight, where the two lie on different pipeline stages."""
    if not model.share_embeddings_and_output_weights or model.pre_process == model.post_process:
        return None
    return model.shared_embedding_or_output_weight()


def mark_tied_copy(model: LanguageModule) -> None:
    """Keep the last stage's copy of a tied embedding out of the gradient norm. Before `deepspeed.initialize`."""
    weight = tied_weight(model)
    if weight is not None and model.post_process:
        mark(weight, ds_pipe_replicated=True)


def sum_tied_copies(model: LanguageModule) -> None:
    """Both copies of a tied embedding get the sum of their gradients, and so stay equal."""
    weight = tied_weight(model)
    if weight is not None:
        dist.all_reduce(gradient(weight), group=parallel_state.get_embedding_group())
