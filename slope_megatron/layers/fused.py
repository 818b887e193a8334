"""Norms, biases and activations as one kernel each on a GPU, through torch.compile; elsewhere plain torch.

Unfused, each operation reads and writes its whole tensor: on a GPU that is memory traffic and nothing else. On CPUs
compiling costs more than it gives. apex's norms, where they are installed, are Megatron's own choice and stay.
"""

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)
# Of one function: a variant for each shape, with and without gradients. Past dynamo's own limit of 8 it would run
# unfused.
MOST_VARIANTS = 64
# In which threads; asking dynamo takes 2 us, for each norm and activation.
_raised = threading.local()


@functools.cache
def can_compile() -> bool:
    """Whether functions of GPU tensors are compiled here; says so once where they are not."""
    if importlib.util.find_spec("triton") is None:
        logger.info("norms, biases and activations are not fused: triton, which torch.compile needs, is not installed")
        return False
    return True


def allow_variants() -> None:
    """Raise dynamo's limit in this thread: settings are a thread's own, and backward, which recomputes, has another."""
    if getattr(_raised, "here", False):
        return
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_VARIANTS)
    _raised.here = True


def fused(function: Callable) -> Callable:
    """`function`, compiled when it first meets a GPU tensor: nothing compiles at import."""

    @functools.cache
    def compiled() -> Callable:
        # Shapes are few and stay: training, validation.
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(x: torch.Tensor, *arguments):
        # Within another compiled region the compiler sees through the function itself.
        if not x.is_cuda or torch.compiler.is_compiling() or not can_compile():
            return function(x, *arguments)
        allow_variants()
        return compiled()(x, *arguments)

    return call


@fused
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


@fused
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


@fused
def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x *= factor `[1]`, of another type perhaps: torch's own kernel for that takes five times as long as the bytes."""
    return x.mul_(factor)


class FusedLayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm through `layer_norm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class FusedRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm through `rms_norm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
