"""Who computes AdamW: torch, apex or DeepSpeed; asked for, or chosen and said."""

import functools
import logging
from typing import Any

import torch

from slope_megatron.config import Config
from slope_megatron.training.together import first_problem

logger = logging.getLogger(__name__)


def build_adamw(groups: list[dict], config: Config) -> torch.optim.Optimizer:
    """AdamW over named parameter groups, by the implementation that `--adam-backend` means here.

    Raises:
        ValueError: one was asked for by name and cannot run here.
    """
    settings = config.optimizer
    values: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    offloaded = config.parallel.offload_optimizer != "none"
    backend = choose_adam(settings.adam_backend, offloaded, config.parallel.zero_stage)
    if backend == "torch":
        # The default form on GPUs keeps temporaries of the size of the parameters; offloaded state is on the CPU.
        fused = torch.cuda.is_available() and not offloaded
        return torch.optim.AdamW(groups, **values, fused=fused)
    if backend == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **values)
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **values)
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **values)


def choose_adam(requested: str, offloaded: bool, zero_stage: int) -> str:
    """ "torch", "apex" or "deepspeed", the same on every rank (all call it); logs the choice and its reason once.

    Raises:
        ValueError: one was asked for by name and cannot run here.
    """
    if requested == "torch":
        return said("torch", "as requested")
    # Unasked, DeepSpeed's fused kernel would be compiled for minutes, and torch has one.
    candidates = [requested] if requested != "auto" else ["deepspeed"] if offloaded else ["apex"]
    for candidate in candidates:
        reason = first_problem(unavailable(candidate, offloaded, zero_stage))
        if reason is None:
            return said(candidate, "as requested" if requested != "auto" else "the fastest that runs here")
        if requested != "auto":
            raise ValueError(f"--adam-backend {requested} cannot run here: {reason}; use --adam-backend auto")
    return said("torch", f"{candidates[0]}: {reason}")


@functools.cache
def said(backend: str, why: str) -> str:
    logger.info("AdamW: %s (%s)", backend, why)
    return backend


def unavailable(backend: str, offloaded: bool, zero_stage: int) -> str | None:
    """Why this rank cannot run it; None: it can. May compile DeepSpeed's, once a machine."""
    if backend == "apex":
        return unavailable_apex(offloaded, zero_stage)
    if not offloaded and not torch.cuda.is_available():
        return "DeepSpeed's fused AdamW needs a GPU"
    from deepspeed.ops import op_builder

    try:
        (op_builder.CPUAdamBuilder if offloaded else op_builder.FusedAdamBuilder)().load(verbose=False)
    except Exception as error:  # compilers fail in many ways
        return f"it does not build ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def unavailable_apex(offloaded: bool, zero_stage: int) -> str | None:
    if offloaded or not torch.cuda.is_available():
        return "apex's fused AdamW needs its state on a GPU"
    if zero_stage == 3:
        return "apex counts one step a group, and ZeRO-3 updates a group in several parts"
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except ImportError:
        return "NVIDIA's apex is not installed"
    return None
