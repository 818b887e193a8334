"""`--deterministic`: on a GPU, only algorithms that add in a fixed order, so that equal states give equal bits.

    embedding     its gradient through a sort instead of atomic additions (Megatron's `deterministic_mode`)
    attention     flash, whose backward has a fixed order on request, or plain products; neither the memory-efficient
                  kernel nor cuDNN's
    products      cuBLAS with a workspace of its own for each stream; 2:4 kernels by the choices of the run, which are
                  saved with it (`kernel_choices`)

What has no such algorithm raises torch's own error instead of running.
"""

import logging
import os

import torch

logger = logging.getLogger(__name__)


def switch_on() -> None:
    """For the rest of the process; before the first product. On a machine without a GPU there is nothing to do."""
    if not torch.cuda.is_available():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # That flag also fills every new tensor, for programs that read what they have not written.
    # torch makes it a property of the module's class, which no checker sees.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    logger.info("deterministic: fixed order of addition everywhere, at some cost in speed")
