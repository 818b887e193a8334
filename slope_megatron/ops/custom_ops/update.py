"""Registered ops of the optimizer's side of a step, each one pass over memory on CUDA.

    slope::accumulate_   fp32 total += 16-bit gradient
    slope::adamw_        AdamW (Loshchilov and Hutter 2019, algorithm 2) with clipping before it and rounding after it
On a CPU they are plain torch.
"""

import torch


@torch.library.custom_op("slope::accumulate_", mutates_args=("total",), device_types="cuda")
def accumulate_(total: torch.Tensor, gradient: torch.Tensor) -> None:
    """total += gradient, each of one size; torch's own addition of mixed types reaches half of the bandwidth."""
    if total.is_contiguous() and gradient.is_contiguous() and total.dtype == torch.float32:
        from slope_kernels.triton.update import accumulate

        accumulate(total, gradient)
    else:
        total.add_(gradient.view_as(total) if gradient.is_contiguous() else gradient.reshape(total.shape))


@accumulate_.register_kernel("cpu")
def _(total, gradient):
    total.add_(gradient.reshape(total.shape))


@torch.library.custom_op("slope::adamw_", mutates_args=("master", "mean", "square", "weight"), device_types="cuda")
def adamw_(
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    step: torch.Tensor,
    coefficient: float,
    lr: float,
    decay: float,
    eps: float,
    beta1: float,
    beta2: float,
) -> None:
    """One update of flat tensors `[P]`: with g the gradient times `coefficient` and t the update's number,

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        w = w - lr decay w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        master, mean, square: w, m and v in fp32.
        weight: gets w, in its own type.
        step: t, fp32, on the device.
    """
    from slope_kernels.triton import update

    how = {"coefficient": coefficient, "lr": lr, "decay": decay, "eps": eps, "beta1": beta1, "beta2": beta2}
    update.adamw(master, mean, square, weight, gradient, step, **how)


@adamw_.register_kernel("cpu")
def _(master, mean, square, weight, gradient, step, coefficient, lr, decay, eps, beta1, beta2):
    clipped, count = gradient * coefficient, step.double()
    mean.mul_(beta1).add_(clipped, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(clipped, clipped, value=1 - beta2)
    deviation = (square / (1 - beta2**count)).sqrt().add_(eps)
    master.mul_(1 - lr * decay).sub_(mean / (1 - beta1**count) / deviation * lr)
    weight.copy_(master)
