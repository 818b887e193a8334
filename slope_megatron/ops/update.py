"""The optimizer's side of a step, each one pass over memory on a GPU with Triton; plain torch elsewhere.

Nothing traces these: they are no registered ops, which would cost the host as much as the kernels take the GPU.
"""

import torch

from slope_megatron.ops.custom_ops.products import HAS_TRITON, aligned, gather_kept

# Below so many elements, launching takes longer than torch's own addition.
WORTH_A_KERNEL = 2**17


def accumulate_(total: torch.Tensor, gradient: torch.Tensor) -> None:
    """fp32 total += 16-bit gradient, of one size; torch's own addition of mixed types reaches half of the bandwidth."""
    worth = total.is_cuda and total.numel() >= WORTH_A_KERNEL and HAS_TRITON
    if worth and total.is_contiguous() and gradient.is_contiguous() and total.dtype == torch.float32:
        from slope_kernels.triton.update import accumulate

        accumulate(total, gradient)
    else:
        total.add_(gradient.reshape(total.shape))


def handed_on(gradient: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient for autograd; or None, where it has been added to an fp32 sum that the caller keeps."""
    if total is None:
        return gradient
    accumulate_(total, gradient)
    return None


def kept(dense_NK: torch.Tensor, row_bits: torch.Tensor, total_NC: torch.Tensor | None) -> torch.Tensor | None:
    """The same of the kept values `[N, C]` of a dense gradient: added to the sum, they are never written apart."""
    if total_NC is not None and dense_NK.is_cuda and dense_NK.dtype.itemsize == 2 and HAS_TRITON:
        from slope_kernels.triton.gather import gather_add

        gather_add(aligned(dense_NK, 8), aligned(row_bits), total_NC)
        return None
    return handed_on(gather_kept(dense_NK, row_bits), total_NC)


def adamw_(
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    step: torch.Tensor,
    *,
    coefficient: float,
    lr: float,
    decay: float,
    eps: float,
    beta1: float,
    beta2: float,
) -> None:
    """One update by AdamW (Loshchilov and Hutter 2019, algorithm 2) of flat tensors `[P]`, clipped before and rounded
    after it: with g the gradient times `coefficient` and t the update's number,

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        w = w - lr decay w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        master, mean, square: w, m and v in fp32.
        weight: gets w, in its own type.
        step: t, fp32, where the others are.
    """
    if master.is_cuda:
        from slope_kernels.triton.update import adamw

        how = {"coefficient": coefficient, "lr": lr, "decay": decay, "eps": eps, "beta1": beta1, "beta2": beta2}
        adamw(master, mean, square, weight, gradient, step, **how)
        return
    clipped, count = gradient * coefficient, step.double()
    mean.mul_(beta1).add_(clipped, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(clipped, clipped, value=1 - beta2)
    deviation = (square / (1 - beta2**count)).sqrt().add_(eps)
    master.mul_(1 - lr * decay).sub_(mean / (1 - beta1**count) / deviation * lr)
    weight.copy_(master)
