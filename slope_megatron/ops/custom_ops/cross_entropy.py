"""Registered ops of a loss over logits; see `custom_ops.products` for what that means.

T tokens, V entries of the vocabulary, or a rank's part of it; z [T, V] logits, y [T] labels, n [T] = log sum exp(z).
    slope::label_statistics   n and z[y], in fp32 at least; of a label that is not here, 0
    slope::logit_gradient     dz = ((1 + 2 c n) exp(z - n) - [y]) w, w [T], c a z-loss' coefficient
    slope::logit_gradient_    the same in the logits' place
On CUDA they run `slope_kernels`, which make no fp32 copy of the logits; on a CPU, and for fp64, plain torch.
"""

import torch

from slope_megatron.ops.custom_ops.products import has_kernels


@torch.library.custom_op("slope::label_statistics", mutates_args=(), device_types="cuda")
def label_statistics(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """n and z[y] `[T]`; as in torch, a row with inf has n = inf, and one of -inf alone -inf."""
    if not has_kernels(logits_TV):
        return _statistics(logits_TV, labels_T)
    from slope_kernels.triton import cross_entropy

    normalizer_T, chosen_T = _rows_like(logits_TV), _rows_like(logits_TV)
    cross_entropy.statistics(logits_TV.contiguous(), labels_T.contiguous(), normalizer_T, chosen_T)
    return normalizer_T, chosen_T


def _rows_like(logits_TV: torch.Tensor) -> torch.Tensor:
    """A number for each row, in fp32 at least."""
    return logits_TV.new_empty(logits_TV.shape[0], dtype=torch.promote_types(logits_TV.dtype, torch.float32))


@label_statistics.register_kernel("cpu")
def _statistics(logits_TV, labels_T):
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return logits_TV.logsumexp(-1), torch.where(_is_label(logits_TV, labels_T), logits_TV, 0.0).sum(-1)


def _is_label(logits_TV, labels_T) -> torch.Tensor:
    return torch.arange(logits_TV.shape[1], device=logits_TV.device) == labels_T[:, None]


@label_statistics.register_fake
def _(logits_TV, labels_T):
    return _rows_like(logits_TV), _rows_like(logits_TV)


@torch.library.custom_op("slope::logit_gradient", mutates_args=(), device_types="cuda")
def logit_gradient(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    normalizer_T: torch.Tensor,
    weight_T: torch.Tensor,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """dz `[T, V]` of the logits' type; `normalizer_T`: n, over the logits of all ranks, in fp32 at least."""
    if not has_kernels(logits_TV):
        return _gradient(logits_TV, labels_T, normalizer_T, weight_T, z_loss)
    gradient_TV = torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
    _write_gradient(logits_TV.contiguous(), labels_T, normalizer_T, weight_T, gradient_TV, z_loss)
    return gradient_TV


@torch.library.custom_op("slope::logit_gradient_", mutates_args=("logits_TV",), device_types="cuda")
def logit_gradient_(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    normalizer_T: torch.Tensor,
    weight_T: torch.Tensor,
    z_loss: float = 0.0,
) -> None:
    """Overwrite the logits with dz: the same numbers as beside them, whatever the strides."""
    if has_kernels(logits_TV) and logits_TV.is_contiguous():
        _write_gradient(logits_TV, labels_T, normalizer_T, weight_T, logits_TV, z_loss)
    else:
        logits_TV.copy_(logit_gradient(logits_TV, labels_T, normalizer_T, weight_T, z_loss))


def _write_gradient(logits_TV, labels_T, normalizer_T, weight_T, gradient_TV, z_loss) -> None:
    from slope_kernels.triton import cross_entropy

    labels_T, normalizer_T, weight_T = (tensor.contiguous() for tensor in (labels_T, normalizer_T, weight_T))
    cross_entropy.gradient(logits_TV, labels_T, normalizer_T, weight_T, gradient_TV, z_loss)


@logit_gradient.register_kernel("cpu")
def _gradient(logits_TV, labels_T, normalizer_T, weight_T, z_loss=0.0):
    softmax_TV = (logits_TV.to(normalizer_T.dtype) - normalizer_T[:, None]).exp()
    if z_loss:
        softmax_TV *= 1.0 + 2.0 * z_loss * normalizer_T[:, None]
    label_TV = _is_label(logits_TV, labels_T).to(softmax_TV.dtype)
    return ((softmax_TV - label_TV) * weight_T[:, None]).to(logits_TV.dtype)


@logit_gradient_.register_kernel("cpu")
def _(logits_TV, labels_T, normalizer_T, weight_T, z_loss=0.0):
    logits_TV.copy_(_gradient(logits_TV, labels_T, normalizer_T, weight_T, z_loss))


@logit_gradient.register_fake
def _(logits_TV, labels_T, normalizer_T, weight_T, z_loss=0.0):
    return torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
