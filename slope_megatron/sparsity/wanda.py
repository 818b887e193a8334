"""Wanda (arXiv 2306.11695): one-shot pruning by |W| ||X||_2, compared within each output's groups.

A weight counts by its magnitude times the norm of the input feature that it multiplies, over calibration tokens.
T tokens, N out, K in.
"""

import torch

from slope_megatron.sparsity.pattern import top_n_of_m


def squared_norms(x_TK: torch.Tensor) -> torch.Tensor:
    """sum over the tokens of X^2, fp64 `[K]`; batches add up."""
    return x_TK.double().square().sum(0)


def wanda_mask(weight_NK: torch.Tensor, squared_norms_K: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The n highest |W_ij| ||X_j||_2 of every m consecutive weights of a row: bool `[N, K]`."""
    return top_n_of_m(weight_NK.abs().double() * squared_norms_K.sqrt(), n, m)
