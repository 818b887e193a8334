"""The dense oracle: the four equations of a SLoPe linear as written, on unpacked weights. Every test compares with it.

T tokens, N out, K in, R rank.
    forward   Y  = X (W^R)^T + (1/R) (X L) R
    dgrad     dX = dY W^{R,C} + (1/R) (dY R^T) L^T
    wgrad     dW = (dY^T X) at the kept positions of W^R
    adapters  dL = (1/R) X^T (dY R^T),   dR = (1/R) (X L)^T dY
Surprising: dX uses W^{R,C}, which lacks weights that W^R has: it is not the forward's gradient (SLoPe, eq. 4-6).
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients of one linear; `adapter_l` and `adapter_r` are None without adapters."""

    x_TK: torch.Tensor
    weight_NK: torch.Tensor
    adapter_l_KR: torch.Tensor | None = None
    adapter_r_RN: torch.Tensor | None = None


def forward(x_TK, weight_NK, row_NK, adapter_l_KR=None, adapter_r_RN=None) -> torch.Tensor:
    """Y `[T, N]`; `weight_NK` is read only where `row_NK` is True."""
    y_TN = x_TK @ (weight_NK * row_NK).t()
    if adapter_l_KR is not None:
        y_TN = y_TN + (x_TK @ adapter_l_KR) @ adapter_r_RN / adapter_l_KR.shape[1]
    return y_TN


def backward(x_TK, dy_TN, weight_NK, row_NK, column_NK, adapter_l_KR=None, adapter_r_RN=None) -> Gradients:
    """All gradients; that of the weight is dense with zeros where `row_NK` is False."""
    dx_TK = dy_TN @ (weight_NK * column_NK)
    dw_NK = (dy_TN.t() @ x_TK) * row_NK
    if adapter_l_KR is None:
        return Gradients(dx_TK, dw_NK)
    rank = adapter_l_KR.shape[1]
    dh_TR = dy_TN @ adapter_r_RN.t() / rank
    return Gradients(
        dx_TK + dh_TR @ adapter_l_KR.t(),
        dw_NK,
        x_TK.t() @ dh_TR,
        (x_TK @ adapter_l_KR).t() @ dy_TN / rank,
    )
